"""What the answer of a response is, and when two answers are equal. Nothing here executes or evaluates model text."""

from data_pipeline.answers.extract import Extracted, Kind, extract
from data_pipeline.answers.judge import GRADER_VERSION, KINDS, Votes, check_gold, is_equal
from data_pipeline.answers.numbers import parse_number

__all__ = [
    "GRADER_VERSION",
    "KINDS",
    "Extracted",
    "Kind",
    "Votes",
    "check_gold",
    "extract",
    "is_equal",
    "parse_number",
]
