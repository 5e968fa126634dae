"""Tests; a package, so that tests import `tests.oracles` and nothing that is called `tests` elsewhere."""
