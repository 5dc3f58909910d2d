"""The chat template: how a question becomes a prompt and a solution becomes a response.

One template is used in training and in evaluation: it is saved with every checkpoint. Another one is a YAML
file with the same two keys.
"""

import hashlib
import json
import string

import pydantic

from data_pipeline.settings import Settings, UsageError, read_yaml, validated

DEFAULT_TEMPLATE = "default"


class Template(Settings):
    """Two format strings. The prompt ends where the model begins to write; EOS follows the response."""

    prompt: str = pydantic.Field("Problem: {question}\nSolution:", description="may use {question}")
    response: str = pydantic.Field(
        "{solution}\nThe answer is: {answer}.",
        description="uses {solution}, {answer} or both; an answer line is what the grader looks for first",
    )

    @pydantic.model_validator(mode="after")
    def _fields_known(self) -> "Template":
        for key, text, allowed in (
            ("prompt", self.prompt, {"question"}),
            ("response", self.response, {"solution", "answer"}),
        ):
            try:
                used = {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}
                if used <= allowed:
                    text.format(question="", solution="", answer="")
            except (ValueError, LookupError, AttributeError) as error:
                raise ValueError(f"{key}: {error}; write {{{{ and }}}} for literal braces") from error
            if not used or not used <= allowed:
                has = " and ".join(f"{{{name}}}" for name in sorted(used)) or "none"
                raise ValueError(
                    f"{key} must contain {' or '.join(f'{{{name}}}' for name in sorted(allowed))}; it has {has}"
                )
        return self

    def render_prompt(self, question: str) -> str:
        """The text that the model is given."""
        return self.prompt.format(question=question)

    def render_response(self, solution: str, answer: str) -> str:
        """The text that the model is to write (without EOS)."""
        return self.response.format(solution=solution, answer=answer)

    @property
    def sha256(self) -> str:
        """Identifies the wording."""
        return hashlib.sha256(json.dumps([self.prompt, self.response]).encode()).hexdigest()


def load_template(name: str | None) -> Template:
    """`default` (or None), or the path of a YAML file with `prompt` and `response`. Raises UsageError."""
    if name is None or name == DEFAULT_TEMPLATE:
        return Template()
    tree = read_yaml(name, "template")
    template = validated(Template, tree, where=name)
    for key in Template.model_fields:
        if key not in tree:
            raise UsageError(f"{name}: a template has both prompt and response, and {key} is missing")
    return template
