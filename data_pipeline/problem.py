"""What a problem is."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Problem:
    """A question with its worked solution (without the answer line) and its gold answer.

    `num_steps` is the number of steps in the solution, counted as its task says. The solution is empty where none is
    published: such a problem can be asked, not learnt from. `lineage` is what it was made from, as JSON; "" where it
    is an original.
    """

    id: str
    question: str
    solution: str
    answer: str
    num_steps: int | None = None
    level: str | None = None
    subject: str | None = None
    lineage: str = ""
