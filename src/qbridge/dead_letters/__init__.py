"""Dead letters: what they hold, and what can be done with them."""

from qbridge.dead_letters.box import DeadLetters as DeadLetters
from qbridge.dead_letters.letter import DeadLetter as DeadLetter
from qbridge.dead_letters.letter import Reason as Reason

__all__ = ["DeadLetter", "DeadLetters", "Reason"]
