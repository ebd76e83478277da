"""`FieldReader`: what lenient dialects read of single values."""

import tracemalloc

from server.api.dialects.fields import FieldReader

FILE = bytes(8_000_000)


def test_file_in_place_of_a_word_is_not_written_out() -> None:
    reader = FieldReader({"base64": FILE, "scheduler": FILE, "stream": [[FILE]]})
    tracemalloc.start()
    assert not reader.flag("base64", default=False)
    assert reader.flag("stream", default=True)
    assert reader.scheduler() is None
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 1_000_000, "Python writes four characters for a byte"
    assert reader.errors.keys() == {"base64", "stream"}
