"""The benchmarks' scripts work, at sizes at which their figures mean nothing."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from bench import masking, own, peer_claims, peers, private, run, wire
from bench.costs import SIZE
from bench.fleet import Fleet, plan_text
from bench.growth import exponents, measure_cells, slope
from bench.rows import Bar, Row, row, table
from bench.scale import Scale
from privacy.errors import UserError
from privacy.secagg.masking import packed_length

TINY = 1 << 17


@pytest.fixture
def scale(tmp_path: Path) -> Scale:
    return Scale(tmp_path, quick=True)


# --- rows ------------------------------------------------------------------------------------------------------------


def a_row(value: float, bar: Bar | None, reference: float | None = None) -> Row:
    return row("name", value, "s", n=3, d=64, reference=reference, bar=bar, note="what")


@pytest.mark.parametrize(
    ("value", "reference", "bar", "holds"),
    [
        (2.0, 4.0, Bar("ratio", least=0.5), True),
        (1.9, 4.0, Bar("ratio", least=0.5), False),
        (4.0, 4.0, Bar("ratio", 0.9, 1.1), True),
        (5.0, 4.0, Bar("ratio", 0.9, 1.1), False),
        (3.0, None, Bar("value", most=3.05), True),
        (3.1, None, Bar("value", most=3.05), False),
        (3.1, None, Bar("ratio", most=3.05), False),  # nothing to compare with is no pass
        (3.1, None, None, None),
    ],
)
def test_a_bar_is_about_the_ratio_or_the_value(
    value: float, reference: float | None, bar: Bar | None, holds: bool | None
) -> None:
    assert a_row(value, bar, reference).holds is holds


def test_the_table_has_a_line_for_every_row_and_shows_what_does_not_hold() -> None:
    lines = table([a_row(1, None), a_row(9, Bar("value", most=3.05))]).splitlines()
    assert len(lines) == 4
    assert "**no**" in lines[2]
    assert "≤ 3.05" in lines[2]
    assert len({line.count("|") for line in lines}) == 1


def test_a_missed_bar_and_a_failed_group_end_with_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.judge([a_row(3, Bar("value", most=4))], [], quick=False) == 0
    assert run.judge([a_row(9, Bar("value", most=4))], [], quick=False) == 1
    assert "DOES NOT HOLD" in capsys.readouterr().out
    assert run.judge([], ["one: reason"], quick=False) == 1


def test_a_failed_group_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch, scale: Scale) -> None:
    def broken(_scale: Scale) -> list[Row]:
        raise RuntimeError("broken")

    monkeypatch.setattr(run, "GROUPS", {"first": broken, "second": lambda _scale: [a_row(1, None)]})
    rows, failed = run.run_groups(["first", "second"], scale)
    assert len(rows) == 1
    assert "broken" in failed[0]


def test_a_quick_run_writes_json_and_markdown(tmp_path: Path) -> None:
    assert run.main(["--quick", "--only", "shamir_128", "--out", str(tmp_path / "found")]) == 0
    [found] = json.loads((tmp_path / "found.json").read_text())
    assert {"name", "value", "unit", "reference", "ratio", "n", "d"} <= found.keys()
    assert found["d"] == SIZE
    text = (tmp_path / "found.md").read_text()
    assert "`shamir_128`" in text
    assert socket.gethostname() not in text


# --- what is measured ------------------------------------------------------------------------------------------------


def test_the_rate_in_openssl_s_output_is_found() -> None:
    assert masking.parse_speed("+H:16384\n+F:25:AES-256-CTR:7864294400.00\n") == 7864294400.0
    with pytest.raises(RuntimeError, match=r"expected a line \+F"):
        masking.parse_speed("+H:16384\n")


def test_without_openssl_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="openssl"):
        masking.openssl_rate()


def test_the_mask_rows(monkeypatch: pytest.MonkeyPatch, scale: Scale) -> None:
    monkeypatch.setattr(masking, "openssl_rate", lambda: 1e9)
    [stream], [threads] = masking.mask_stream(scale), masking.mask_threads(scale)
    assert stream.reference == 1
    assert stream.value > 0
    assert threads.ratio is not None


def extra_bytes(expression: str) -> int:
    """Of a process of its own: one that ran hundreds of tests may give back more meanwhile than the call takes."""
    task = f"from bench.meter import measure; print(measure(lambda: {expression}, 1).extra_bytes)"
    return int(subprocess.run([sys.executable, "-c", task], capture_output=True, text=True, check=True).stdout)


def test_peak_memory_is_that_of_the_call() -> None:
    assert 60 << 20 < extra_bytes('bytes(b"x" * (64 << 20))') < 140 << 20
    assert extra_bytes("None") < 4 << 20


def test_the_own_tasks(scale: Scale) -> None:
    vector = peers.delta_file(scale)
    assert own.participant(vector, 4, 1)["cpu_s"] > 0
    assert own.coordinator(scale.size, 4, 1, scale.scratch)["opening_s"] > 0
    sent = own.upload(scale.size, 4)
    assert packed_length(scale.size, own.BITS) < sent["bytes"] < packed_length(scale.size, own.BITS) + (64 << 10)


def test_without_the_peers_the_error_names_the_script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(peers, "PEERS", tmp_path / "python")
    with pytest.raises(UserError, match="found nothing") as caught:
        peers.ask_peer(peers.FLOWER, "version")
    assert "scripts/peers.sh" in caught.value.hint


def test_the_fit_finds_the_exponents() -> None:
    cells = {(d, n): 3e-9 * d * n**0.5 for d in (1000, 4000, 16000) for n in (5, 10, 20)}
    assert exponents(cells) == pytest.approx((1.0, 0.5))
    assert slope({n: 7.0 * n**2 for n in (5, 10, 20)}) == pytest.approx(2.0)


def test_a_cell_of_the_growth_rows(scale: Scale) -> None:
    ours, theirs = measure_cells(scale, (1 << 16,), (4,))
    assert ours.keys() == theirs.keys() == {(0, 4), (1 << 16, 4)}
    assert min(*ours.values(), *theirs.values()) > 0


# --- the wire --------------------------------------------------------------------------------------------------------


def echo_server() -> int:
    """A loopback port that sends back what it gets, for one connection."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connection, _ = server.accept()
        with connection, server:
            while data := connection.recv(1 << 16):
                connection.sendall(data)

    threading.Thread(target=serve, daemon=True).start()
    port: int = server.getsockname()[1]
    return port


def test_the_proxy_delays_by_a_round_trip_and_bounds_what_is_in_flight() -> None:
    with (
        wire.listening("bench.delay", "--to", echo_server(), "--rtt", 0.2, "--window", 1000) as port,
        socket.create_connection(("127.0.0.1", port)) as connection,
    ):
        began = time.perf_counter()
        connection.sendall(b"x" * 2500)
        left = 2500
        while left:
            left -= len(connection.recv(left))
        assert time.perf_counter() - began >= 0.6  # the third thousand may start after two round trips


def test_a_round_of_real_processes_near_and_far_and_its_total_is_checked(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, 3, 1 << 12)
    with fleet.running():
        measured = wire.Measured(fleet)
        for rtt_ms in (0, 20):
            seconds, upload = measured.rows(rtt_ms, 1)
            assert seconds.value > 0
            assert upload.ratio is not None
        fleet.vector[7] += 1
        with pytest.raises(RuntimeError, match="not the sum"):
            fleet.check_total("bench-1")


def test_a_plan_for_the_fleet_has_whole_modules() -> None:
    with pytest.raises(ValueError, match="multiple of 64"):
        plan_text("bench", 100, 3)


@pytest.mark.slow
def test_a_private_step_is_measured_beside_another(monkeypatch: pytest.MonkeyPatch, scale: Scale) -> None:
    monkeypatch.setattr(private, "_memory", lambda kind, *_: (kind + 1) << 20)
    step, memory, tested = private.dp_step(scale)
    assert 0 < tested.value < 100
    assert (step.name, step.d, memory.name) == ("dp_step", 38_789, "dp_step_memory")
    assert step.ratio is not None
    assert 0.2 < step.ratio < 20
    assert (memory.value, memory.reference) == (2.0, 1.0)


# --- what is said of other frameworks --------------------------------------------------------------------------------


def test_a_claim_whose_wheel_is_not_here_says_which(capsys: pytest.CaptureFixture[str]) -> None:
    assert peer_claims.main(["--only", "fate"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("not run  fate-low-bits: expected the package fate_utils")
    assert peer_claims.EXTRA["fate"] in said


def test_a_claim_that_does_not_hold_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peer_claims, "CLAIMS", {"a": lambda: (True, "as said"), "b": lambda: (False, "mended")})
    assert peer_claims.main([]) == 1
    assert capsys.readouterr().out == "holds    a: as said\nDIFFERS  b: mended\n"
