"""Tables that appear while they are looked at are seen whole or not at all."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import NoSuchTableError

from qbridge.backends.database.tables import Layout, ResultTables
from qbridge.testing.servers import PostgreSQLServer


def test_a_sequence_made_between_two_looks_is_not_taken_for_missing(
    qbridge_postgresql: PostgreSQLServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process makes the tables just after the first look: rows must get their numbers all the same."""
    with qbridge_postgresql.fresh() as url:
        engine, tables = sa.create_engine(url), ResultTables()
        looked: list[str] = []

        inspect = sa.inspect

        class Looking:
            """An inspector; after its first look at anything the tables are made elsewhere."""

            def __init__(self, found: sa.Engine) -> None:
                self.real = inspect(found)

            def __getattr__(self, name: str) -> Any:
                def look(*args: Any, **kwargs: Any) -> Any:
                    try:
                        return getattr(self.real, name)(*args, **kwargs)
                    finally:
                        looked.append(name)
                        if len(looked) == 1:
                            tables.metadata.create_all(engine)

                return look

        monkeypatch.setattr("qbridge.backends.database.tables.sa.inspect", Looking)
        try:
            layout = Layout.find(engine, tables, extended=False)
        except NoSuchTableError:
            layout = Layout.find(engine, tables, extended=False)  # what the backend does: look again
        with engine.begin() as connection:
            new = {f"new_{name}": None for name in layout.columns}
            connection.execute(layout.upsert, {**new, "new_task_id": "1", "new_status": "SUCCESS"})  # type: ignore[arg-type]
            assert connection.scalar(sa.select(tables.task.c.id)) == 1
        engine.dispose()
