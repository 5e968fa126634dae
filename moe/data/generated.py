"""What the sets that this package generates by itself have in common."""

import tensorflow_datasets as tfds


class GeneratedInfo(tfds.core.DatasetInfo):
    """Information on a set that is generated here.

    The base class looks for published statistics first, and leaves an empty folder in the system's temporary folder
    each time; a generated set has no published statistics.
    """

    def initialize_from_bucket(self) -> None:
        """Does nothing."""
