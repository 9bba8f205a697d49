"""Mapped classes for tests of sessions, and their tables."""

from __future__ import annotations

from typing import Any

import psycopg
from sqlalchemy import ForeignKey
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from coordinator import Coordinator
from participants.postgres import PostgreSQL
from tests.support.postgres import gids, query

TABLES = """
DROP TABLE IF EXISTS book, author;
CREATE TABLE author (id serial PRIMARY KEY, name text NOT NULL UNIQUE);
CREATE TABLE book (
    id serial PRIMARY KEY,
    title text NOT NULL UNIQUE DEFERRABLE INITIALLY DEFERRED,
    facts jsonb,
    author_id int NOT NULL REFERENCES author
);
"""
AUTHORS = "SELECT name FROM author ORDER BY name"
BOOKS = "SELECT title FROM book ORDER BY title"


class Base(DeclarativeBase):
    pass


class Author(Base):
    __tablename__ = "author"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    books: Mapped[list[Book]] = relationship(back_populates="author")


class Book(Base):
    __tablename__ = "book"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    facts: Mapped[Any] = mapped_column(JSONB, default=None)
    author_id: Mapped[int] = mapped_column(ForeignKey("author.id"))
    author: Mapped[Author] = relationship(back_populates="books")


def create_tables(url: str) -> None:
    """The tables, empty."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(TABLES)


def names(url: str) -> list[str]:
    """The authors who are committed."""
    return [str(row[0]) for row in query(url, AUTHORS)]


def titles(url: str) -> list[str]:
    """The books that are committed."""
    return [str(row[0]) for row in query(url, BOOKS)]


def sqlalchemy_url(url: str) -> str:
    """The same database as SQLAlchemy wants to be told."""
    return url.replace("postgresql://", "postgresql+psycopg://", 1)


class Shop:
    """A coordinator over two databases with the tables; not open yet."""

    def __init__(self, first: str, second: str) -> None:
        self.urls = (first, second)
        for url in self.urls:
            create_tables(url)
        self.accounts = PostgreSQL("accounts", first)
        self.ledger = PostgreSQL("ledger", second)
        participants = [self.accounts, self.ledger]
        self.coordinator = Coordinator("memory:", cluster="shop", participants=participants)

    @property
    def names(self) -> list[list[str]]:
        """The committed authors in each database."""
        return [names(url) for url in self.urls]

    def assert_nothing_is_left(self) -> None:
        assert self.names == [[], []]
        assert [gids(url) for url in self.urls] == [[], []]
