"""Tables of other libraries as records: pandas and Polars data frames, Arrow tables. None of them is imported."""

from typing import Any


def records_of(data: Any) -> Any:
    """A table as a list of dicts, one per row, with None where a value is missing; anything else unchanged."""
    if hasattr(data, "iloc") and hasattr(data, "columns"):  # pandas
        kept = data.astype(object).where(data.notna(), None)
        return [{key: _plain(value) for key, value in record.items()} for record in kept.to_dict("records")]
    for name in ("to_dicts", "to_pylist"):  # Polars, Arrow
        if callable(getattr(data, name, None)) and hasattr(data, "columns"):
            return getattr(data, name)()
    return data


def _plain(value: Any) -> Any:
    """NumPy's arrays, which Parquet files have for lists, and scalars as Python's."""
    return value.tolist() if hasattr(value, "tolist") and hasattr(value, "dtype") else value
