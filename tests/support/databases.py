"""SQLite files with our tables, and what is done to tables behind the server's back."""

from pathlib import Path

from sqlalchemy import Engine, text

from server.storage.database import migrate, open_engine


def migrated_sqlite(folder: Path) -> str:
    """The URL of a new SQLite file with our tables."""
    url = f"sqlite:///{folder}/inpaint.db"
    engine = open_engine(url)
    migrate(engine)
    engine.dispose()
    return url


def rename_table(engine: Engine, old: str, new: str) -> None:
    with engine.begin() as connection:
        connection.execute(text(f"ALTER TABLE {old} RENAME TO {new}"))
