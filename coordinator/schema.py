"""The tables of the coordinator's database, version by version."""

from __future__ import annotations

#: One entry a version; ``pragma user_version`` says how many of them a database has.
SCHEMA = (
    """
create table plans (digest blob primary key, name text unique not null, toml blob not null, state text not null,
                    reason text not null, submitted real not null);
create table ready (plan blob not null, stage integer not null, member integer not null, since real not null,
                    primary key (plan, stage, member));
create table rounds (id blob primary key, plan blob not null, stage integer not null, number integer not null,
                     header blob not null, invited text not null, opened real not null, state text not null,
                     reason text not null, culprit integer, unique (plan, stage, number));
create table events (round blob not null, seq integer not null, kind text not null, payload blob not null,
                     at real not null, primary key (round, seq));
create table receipts (round blob not null, member integer not null, root blob not null, length integer not null,
                       signature blob not null, primary key (round, member));
create table traffic (round blob not null, member integer not null, sent integer not null, received integer not null,
                      chunks integer not null, primary key (round, member));
""",
    """
create table uploads (round blob not null, member integer not null, input blob not null, durable integer not null,
                      primary key (round, member));
create table sums (round blob primary key, generation integer not null, members text not null);
create table shards (round blob not null, first integer not null, hashes blob not null, primary key (round, first));
""",
    """
create table stages (plan blob not null, stage integer not null, opened real not null, cohorts text not null,
                     start blob, primary key (plan, stage));
""",
    """
alter table plans add column roster blob not null default x'';
""",
)
