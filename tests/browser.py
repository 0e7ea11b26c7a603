"""The browser that `spiked bench web` measures with, for the tests of both pages."""

from spiked.bench.browser import Page, installed

__all__ = ["Page", "installed"]
