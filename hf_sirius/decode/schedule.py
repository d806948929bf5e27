"""How many tokens a cycle drafts or looks up, where `kernel_size` is a list: so many as another call noted."""

from collections.abc import Sequence

from .stats import Cycle


class Schedule:
    """Stands where a [`Controller`] does, and goes by no clock.

    Args:
        kernel_sizes: tokens of each cycle, such as `stats.kernel_sizes`; negative where they are to be looked up. The
            last one stays.
    """

    reason = None
    goes_on = None  # drafts end where the others did

    def __init__(self, kernel_sizes: Sequence[int]):
        self.kernel_sizes = kernel_sizes
        self.is_selected = False  # whether neurons were chosen in this call
        self._num_cycles = 0

    @property
    def _kernel_size(self) -> int:
        return self.kernel_sizes[min(self._num_cycles, len(self.kernel_sizes) - 1)]

    def num_tokens(self, most: int) -> int:
        """Returns how many tokens the running cycle drafts."""
        return abs(self._kernel_size) - 1

    def looks_up(self) -> bool:
        """Whether the tokens of the running cycle are looked up; where nothing is found, as many are drafted."""
        return self._kernel_size < 0

    def num_looked_up(self, num_found: int, num_sought: int) -> int:
        """Returns how many of so many tokens that were found are proposed."""
        return min(num_found, self.num_tokens(num_found))

    def note_selection(self, seconds: float) -> None:
        """Takes note of the choice of neurons."""
        self.is_selected = True

    def note(self, cycle: Cycle, margins: Sequence[float] = ()) -> None:
        """Goes on to the next cycle."""
        self._num_cycles += 1
