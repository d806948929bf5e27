"""What every method is at a density of 1: nothing is dropped, and nothing watched. A draft is its format alone."""

from .base import SparsityMethod


class Whole(SparsityMethod):
    """Keeps all neurons."""

    is_steady = True
    observed = "neurons"

    def needs_prefill(self):
        return False

    def observe(self, site, values):
        pass

    def choose(self, site):
        pass

    def num_parameters_read(self, site):
        return site.num_parameters()
