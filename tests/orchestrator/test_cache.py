"""The cache of tables: what was read before is read from one file, and is what reading anew gives."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.orchestrator.conftest import fill

from flatmin import Results, cache
from flatmin.errors import CorruptFileWarning


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return fill(tmp_path_factory.mktemp("many") / "r", trials=cache.WORTH + 1, epochs=2)


class TestCache:
    """What was read before is read from one file, and is what reading anew gives."""

    @pytest.fixture(autouse=True)
    def _no_cache(self, many: Results) -> None:
        for file in (many.path / "cache").glob("*"):
            file.unlink()

    @staticmethod
    def anew(results: Results, table: str) -> pa.Table:
        return pa.concat_tables([pq.read_table(file) for file in sorted((results.path / table).glob("*.parquet"))])

    @pytest.mark.parametrize("table", ["models", "epochs", "sharpness"])
    def test_same_rows(self, many: Results, table: str) -> None:
        expected = self.anew(many, table)
        assert many.read(table).equals(expected)
        assert (many.path / "cache" / f"{table}.arrow").exists()
        assert many.read(table).equals(expected)

    def test_no_file_is_opened_again(self, many: Results, monkeypatch: pytest.MonkeyPatch) -> None:
        expected = many.read("epochs")
        monkeypatch.setattr("flatmin.scan.rows_of", None)
        assert many.read("epochs").equals(expected)

    def test_new_changed_and_removed_files_are_seen(self, many: Results) -> None:
        before = many.read("epochs")
        key = {"model_id": "m00000a", "trial_id": "t00000"}
        many.write("epochs", "t00000", [{**key, "epoch": 77}])
        many.write("epochs", "t00033-more", [{**key, "epoch": 78}])
        file = many.table_file("epochs", "t00064")
        content = file.read_bytes()
        file.unlink()
        try:
            assert many.read("epochs").equals(self.anew(many, "epochs"))
            assert {77, 78} < set(many.read("epochs")["epoch"].to_pylist())
            assert len(many.read("epochs")) == len(before) - 4 - 4 + 2
        finally:
            file.write_bytes(content)

    def test_a_file_that_is_damaged_later_is_left_out(self, many: Results) -> None:
        rows = len(many.read("models"))
        file = many.table_file("models", "t00005")
        content = file.read_bytes()
        file.write_bytes(content[:-9])
        with pytest.warns(CorruptFileWarning, match="t00005"):
            assert len(many.read("models")) == rows - 2
        assert [found[:2] for found in many.unreadable()] == [("models", file)]
        file.write_bytes(content)
        assert len(many.read("models")) == rows

    @pytest.mark.parametrize("damage", [b"", b"ARROW1 and nothing else"])
    def test_a_damaged_cache_is_made_again(self, many: Results, damage: bytes) -> None:
        expected = many.read("models")
        file = many.path / "cache" / "models.arrow"
        file.write_bytes(damage)
        assert many.read("models").equals(expected)
        assert file.stat().st_size > 1000

    def test_a_directory_that_cannot_be_written_is_read_all_the_same(self, many: Results, tmp_path: Path) -> None:
        (many.directory / "cache").rename(tmp_path / "aside")
        (many.path / "cache").write_text("in the way")
        try:
            assert len(many.read("models")) == 2 * (cache.WORTH + 1)
        finally:
            (many.path / "cache").unlink()
