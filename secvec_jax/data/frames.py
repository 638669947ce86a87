"""Tables of other libraries as records: pandas and Polars data frames, Arrow tables. None of them is imported."""

from typing import Any

from secvec_jax.errors import UserError


def records_of(data: Any) -> Any:
    """A table as a list of dicts, one per row, with None where a value is missing; anything else unchanged.

    Raises UserError for two columns of one name, of which a dict would keep only the last.
    """
    if hasattr(data, "iloc") and hasattr(data, "columns"):  # pandas
        _check_names(data.columns)
        kept = data.astype(object).where(data.notna(), None)
        return [{key: _plain(value) for key, value in record.items()} for record in kept.to_dict("records")]
    for name in ("to_dicts", "to_pylist"):  # Polars, Arrow
        if callable(getattr(data, name, None)) and hasattr(data, "columns"):
            _check_names(getattr(data, "column_names", data.columns))  # Arrow's `columns` are the values
            return getattr(data, name)()
    return data


def _check_names(names: Any) -> None:
    seen = set[Any]()
    for name in map(str, names):
        if name in seen:
            raise UserError(f"the table has the column {name!r} twice; keep the one that is meant")
        seen.add(name)


def _plain(value: Any) -> Any:
    """NumPy's arrays, which Parquet files have for lists, and scalars as Python's."""
    return value.tolist() if hasattr(value, "tolist") and hasattr(value, "dtype") else value
