"""Tests of redaction rules, encryption, file modes and deletion in the call log."""

from __future__ import annotations

import os
import pickle
import stat
from pathlib import Path
from typing import Any

import pytest
from cryptography.fernet import Fernet

from langchain_datashunt import AlwaysLarge, NoPruning, ShuntRunnable
from langchain_datashunt.call_log import CallLog, CallRecord, Recorder, RedactionRules
from langchain_datashunt.call_log.encryption import KEY_VARIABLE, Seal
from langchain_datashunt.call_log.record import hash_input
from langchain_datashunt.distillation import DistillationSettings, TwoStageDistiller, cold_start
from langchain_datashunt.exceptions import ConfigurationError, DataError, StoreError
from tests.call_log.test_store import call, everything, url  # noqa: F401  # a fixture
from tests.support.models import WordModel

MAIL = "jane@example.com"
SECRET = f"the secret of {MAIL}"


def on_disk(folder: Path) -> bytes:
    return b"".join(file.read_bytes() for file in folder.iterdir() if file.is_file())


def shunted(store: CallLog, keep: RedactionRules | None, texts: list[str]) -> list[CallRecord]:
    with Recorder(store, keep=keep) as recorder:
        shunt = ShuntRunnable(
            small=WordModel(), large=lambda asked: f"about {asked['input']}", policy=AlwaysLarge(), pruning=NoPruning(),
            recorder=recorder,
        )  # fmt: skip
        shunt.batch(texts, {"configurable": {"shunt_subject": "jane"}})
    return everything(store)


@pytest.mark.parametrize("form", ["redacted", "hashed", "left_out"])
def test_redaction_rules_form_is_applied_before_storage(form: Any, tmp_path: Path) -> None:
    with CallLog(f"sqlite:///{tmp_path / 'calls.db'}") as store:
        keep = RedactionRules(input=form, answer=form, small_answer=form, subject=form != "left_out")
        calls = shunted(store, keep, [SECRET, SECRET, f"other {MAIL}"])
        assert not store.verify()
    assert MAIL.encode() not in on_disk(tmp_path)
    told = {one.input for one in calls}
    if form == "redacted":
        assert told == {"the secret of <EMAIL_1>", "other <EMAIL_1>"}
        assert {one.answer for one in calls} == {f"about {text}" for text in told}
    elif form == "hashed":
        assert all(text.startswith("hashed:sha256:") for text in told)
        assert len({one.input for one in calls}) == 2, "equal inputs have equal hashes"
    else:
        assert len(told) == 3
        assert {one.answer for one in calls} == {None}
    assert {one.subject is None for one in calls} == {form == "left_out"}
    assert {one.readable for one in calls} == {form == "redacted"}


def test_redaction_rules_hashed_inputs_are_not_used_for_training() -> None:
    kept = RedactionRules(input="hashed")
    records = [kept(call(i, input=f"refund {i}", answer_label="refund")) for i in range(40)]
    with pytest.raises(DataError, match="in 0 records"):
        TwoStageDistiller(DistillationSettings()).distill(WordModel(), records)
    with pytest.raises(DataError, match="0 usable answers"):
        cold_start(records)


def test_redaction_rules_placeholder_in_input_is_not_reused() -> None:
    kept = RedactionRules(input="redacted", answer="redacted")(
        call(1, input=f"<EMAIL_1> {MAIL}", answer=MAIL, answer_label=None)
    )
    assert (kept.input, kept.answer) == ("<EMAIL_1> <EMAIL_2>", "<EMAIL_2>")
    plain = call(1)
    assert RedactionRules()(plain) == plain


def test_encrypted_log_without_key_cannot_be_read(url: str, tmp_path: Path) -> None:  # noqa: F811
    key, other = Fernet.generate_key(), Fernet.generate_key()
    records = [call(1, input=SECRET, answer=f"about {SECRET}"), call(2, input="x", small_answer=None)]
    with CallLog(url, key=key) as store:
        store.append(records)
        store.append([again := call(1, input=SECRET, answer=f"about {SECRET}")])
        assert sorted(one.input for one in everything(store)) == sorted([SECRET, SECRET, "x"])
        assert not store.verify()
        assert store.get(again.id) is not None
    if url.startswith("sqlite"):
        assert b"secret of" not in on_disk(tmp_path)
        assert hash_input(SECRET) not in on_disk(tmp_path)
    with CallLog(url) as store, pytest.raises(StoreError, match=KEY_VARIABLE):
        everything(store)
    with CallLog(url, key=other) as store, pytest.raises(StoreError, match="another key"):
        everything(store)
    with CallLog(url, key=[other, key]) as store:  # rotated: the new key encrypts, the old one still decrypts
        store.append([call(3, input="new")])
        assert sorted(one.input for one in everything(store)) == sorted([SECRET, SECRET, "new", "x"])
        assert not store.verify()
        assert store.delete(input_hash=records[0].input_hash) == 2
        assert store.delete(input_hash=call(3, input="new").input_hash) == 1
    with CallLog(url, key=[other, key]) as store:
        assert [one.input for one in everything(store)] == ["x"]


def test_encryption_key_from_environment_is_not_exposed(monkeypatch: Any, tmp_path: Path) -> None:
    key = Fernet.generate_key().decode()
    monkeypatch.setenv(KEY_VARIABLE, key)
    with CallLog(f"sqlite:///{tmp_path / 'calls.db'}") as store:
        (one,) = shunted(store, None, [SECRET])
        assert one.input == SECRET
        assert store.seal is not None
        assert key not in repr(store) + repr(store.seal)
        with pytest.raises(TypeError, match="not pickled"):
            pickle.dumps(store.seal)
    assert b"secret of" not in on_disk(tmp_path)
    monkeypatch.delenv(KEY_VARIABLE)
    with CallLog(f"sqlite:///{tmp_path / 'calls.db'}") as store, pytest.raises(StoreError, match="encrypted"):
        everything(store)
    for wrong in ("short", b"\xff", ["a", "b"]):
        with pytest.raises(ConfigurationError, match="not a Fernet key"):
            CallLog(tmp_path / "other.db", key=wrong)


def test_spool_is_encrypted_and_redacted(tmp_path: Path) -> None:
    key = Fernet.generate_key()
    spool = tmp_path / "spool" / "s.db"
    with CallLog(tmp_path / "calls.db", key=key) as store:
        recorder = Recorder(store, spool=spool, keep=RedactionRules(answer="left_out"), retry_seconds=60)
        recorder._away_until = float("inf")
        recorder.record([lambda: call(1, input=SECRET, answer="said")])
        recorder.flush()
        assert recorder.counters.spooled == 1
        with CallLog(spool, key=key) as spooled:
            (one,) = everything(spooled)
        assert (one.input, one.answer) == (SECRET, None)
        assert b"secret of" not in on_disk(spool.parent)
        recorder._away_until = 0.0
        recorder.close()


def test_verify_modified_encrypted_record_is_reported(tmp_path: Path) -> None:
    import sqlite3

    key = Fernet.generate_key()
    with CallLog(tmp_path / "calls.db", key=key) as store:
        store.append([call(1)])
    with sqlite3.connect(tmp_path / "calls.db") as connection:
        (token,) = connection.execute("SELECT input FROM calls").fetchone()
        changed = token[:30] + ("A" if token[30] != "A" else "B") + token[31:]
        connection.execute("UPDATE calls SET input = ?", (changed,))
    with CallLog(tmp_path / "calls.db", key=key) as store:
        assert "changed" in store.verify()[0]


@pytest.mark.skipif(os.name != "posix", reason="requires POSIX file modes")
def test_call_log_sqlite_files_have_mode_0600_despite_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with CallLog(tmp_path / "calls.db") as store:
            shunted(store, None, ["a", "b"])
            modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
    finally:
        os.umask(before)
    assert {"calls.db", "calls.db-wal"} <= set(modes)
    assert set(modes.values()) == {0o600}


def test_recorder_pickle_with_key_outside_environment_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cryptography.fernet import Fernet

    key, other = Fernet.generate_key().decode(), Fernet.generate_key().decode()
    monkeypatch.delenv("DATASHUNT_STORE_KEY", raising=False)
    with Recorder(CallLog(tmp_path / "calls.db", key=key), spool=tmp_path / "s.db") as recorder:
        for told in (None, other):
            if told:
                monkeypatch.setenv("DATASHUNT_STORE_KEY", told)
            with pytest.raises(ConfigurationError, match="keys are not pickled. Set .*DATASHUNT_STORE_KEY"):
                pickle.dumps(recorder)
        monkeypatch.setenv("DATASHUNT_STORE_KEY", key)
        with pickle.loads(pickle.dumps(recorder)) as again:
            assert again.spool == tmp_path / "s.db"
            again.record([lambda: CallRecord(input="a secret", labels=("a", "b"), large_model="gpt", answer_label="a")])
            assert again.flush()
            assert again.counters.written == 1
    assert b"a secret" not in (tmp_path / "calls.db").read_bytes()


def test_recorder_pickled_keeps_redaction_rules(tmp_path: Path) -> None:
    with Recorder(tmp_path / "calls.db", keep=RedactionRules(input="hashed")) as recorder:
        again = pickle.loads(pickle.dumps(recorder))
        assert again.keep == RedactionRules(input="hashed")
        again.close()


def test_seal_text_round_trips_with_random_token() -> None:
    seal = Seal([Fernet.generate_key()])
    assert seal.open_text(seal.seal_text("x")) == "x"
    assert seal.seal_text("x") != seal.seal_text("x")
    assert len(seal.hashes(b"k")[0]) == 16


def test_repr_errors_and_logs_contain_no_password_or_input(tmp_path: Path, caplog: Any) -> None:
    away = "postgresql+psycopg://me:hunter2@127.0.0.1:1/none"
    with caplog.at_level("DEBUG"):
        recorder = Recorder(away, spool=tmp_path / "s.db", retry_seconds=60)
        assert "hunter2" not in repr(recorder)
        recorder.record([lambda: CallRecord(input=SECRET, labels=("a", "b"), probabilities=(1.0,))])
        recorder.record([lambda: CallRecord(input=SECRET, large_confidence=3.0)])
        recorder.flush()
        recorder.close()
    assert recorder.counters.failed == 2
    assert "hunter2" not in caplog.text
    assert SECRET not in caplog.text
    with pytest.raises(StoreError) as caught:
        CallLog(away)
    assert "hunter2" not in str(caught.value)
    with CallLog(tmp_path / "calls.db") as store:
        with store.connection() as connection:
            connection.exec_driver_sql("DROP TABLE calls")
        with pytest.raises(StoreError) as caught:
            store.append([call(1, input=SECRET)])
    assert SECRET not in str(caught.value)
    assert MAIL not in repr(caught.value.__cause__)


def test_delete_subject_works_despite_records_of_a_lost_key(tmp_path: Path) -> None:
    old, new = Fernet.generate_key(), Fernet.generate_key()
    with CallLog(tmp_path / "calls.db", key=old) as store:
        store.append([call(1, subject="jane"), call(9, subject="ann")])
        store.append([call(1, subject="jane")])
    with CallLog(tmp_path / "calls.db", key=new) as store:
        store.append([call(2, subject="joe"), call(3)])
        assert store.delete(subject="joe") == 1
        assert store.delete(subject="jane") == 0, "hashes keyed by another key are not found"
    with CallLog(tmp_path / "calls.db", key=[new, old]) as store:
        assert store.delete(subject="jane") == 2
        assert [one.input for one in everything(store)] == ["question 3", "question 9"]
