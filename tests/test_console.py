"""How the command lines end, and how they read addresses."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from pfedsecure.console import Address, exit_cleanly, one_line, parse_address, parse_addresses
from pfedsecure.errors import PfedError

SUBCLASSES = PfedError.__subclasses__()


def command(error: BaseException | None) -> click.Command:
    @click.command()
    @click.option("--name", required=True)
    @exit_cleanly("pfed-test")
    def main(name: str) -> None:
        click.echo(f"hello {name}")
        if error is not None:
            raise error

    return main


@pytest.mark.parametrize("cls", [PfedError, *SUBCLASSES])
def test_every_error_ends_with_its_line_and_its_status(cls: type[PfedError]) -> None:
    result = CliRunner().invoke(command(cls("what is wrong; what to do")), ["--name", "x"])
    assert result.exit_code == cls.exit_code
    assert result.stderr == "pfed-test: error: what is wrong; what to do\n"


def test_success_interruption_and_usage_keep_their_statuses() -> None:
    assert CliRunner().invoke(command(None), ["--name", "x"]).exit_code == 0
    interrupted = CliRunner().invoke(command(KeyboardInterrupt()), ["--name", "x"])
    assert (interrupted.exit_code, interrupted.stderr) == (130, "pfed-test: interrupted\n")
    assert CliRunner().invoke(command(None), []).exit_code == 2


def test_a_defect_keeps_its_traceback() -> None:
    result = CliRunner().invoke(command(ZeroDivisionError("oops")), ["--name", "x"])
    assert isinstance(result.exception, ZeroDivisionError)
    assert "pfed-test: error" not in result.stderr


def test_a_block_ends_cleanly_too() -> None:
    with pytest.raises(SystemExit) as caught, exit_cleanly("pfed-test"):
        raise SUBCLASSES[0]("wrong")
    assert caught.value.code == SUBCLASSES[0].exit_code


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("two\nlines\r\n", "two lines"),
        ("\x1b[2Jcleared\x07", "[2Jcleared"),
        ("tab\tand  spaces", "tab and spaces"),
        ("right-to-left \u202e override", "right-to-left override"),
        ("Größe ≤ 3 × π", "Größe ≤ 3 × π"),
    ],
)
def test_a_message_cannot_forge_lines_or_steer_the_terminal(text: str, line: str) -> None:
    assert one_line(text) == line


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:8470", Address("127.0.0.1", 8470)),
        ("fl.example.org:0", Address("fl.example.org", 0)),
        ("[::1]:65535", Address("::1", 65535)),
    ],
)
def test_addresses_read_back(text: str, address: Address) -> None:
    assert parse_address(text) == address
    assert str(address) == text


@pytest.mark.parametrize(
    "text", ["", "localhost", ":8470", "localhost:", "localhost:http", "localhost:-1", "localhost:65536", "h:٣"]
)
def test_other_addresses_are_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is not HOST:PORT, such as"):
        parse_address(text)


@pytest.mark.parametrize("text", ["::1:8470", "fe80::1"])
def test_ipv6_needs_its_brackets(text: str) -> None:
    with pytest.raises(click.BadParameter, match="write an IPv6 address in brackets"):
        parse_address(text)


def test_several_addresses_stand_between_commas() -> None:
    assert parse_addresses("one:1") == (Address("one", 1),)
    assert parse_addresses("one:1, [::1]:2,three:3") == (Address("one", 1), Address("::1", 2), Address("three", 3))
    for text in ("one:1,", "one:1,two", ",one:1"):
        with pytest.raises(click.BadParameter, match="is not HOST:PORT"):
            parse_addresses(text)
