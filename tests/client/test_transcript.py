from __future__ import annotations

import io

from client.transcript import CLEAR_LINE, Transcript


def plain() -> tuple[Transcript, io.StringIO]:
    out = io.StringIO()
    return Transcript(out.write, live=False), out


def live(columns: int = 80) -> tuple[Transcript, io.StringIO]:
    out = io.StringIO()
    return Transcript(out.write, live=True, columns=columns), out


def on_screen(out: io.StringIO) -> list[str]:
    """What a terminal would show: CLEAR_LINE empties the line the cursor is on."""
    return [line.split(CLEAR_LINE)[-1] for line in out.getvalue().split("\n")]


def test_plain_lines_are_whole_and_final() -> None:
    transcript, out = plain()
    transcript.person_delta("u1", "what")
    transcript.person_delta("u1", " time")
    assert out.getvalue() == ""
    transcript.person_final("u1", "what time is it")
    transcript.parley_delta("a1", "It is")
    transcript.parley_delta("a1", " noon.")
    transcript.parley_done()
    transcript.close()
    assert out.getvalue() == "you: what time is it\nparley: It is noon.\n"
    assert "\x1b" not in out.getvalue()


def test_plain_cut_is_marked_and_the_rest_goes_on_in_a_new_line() -> None:
    transcript, out = plain()
    transcript.parley_delta("a1", "One, two,")
    transcript.parley_cut()
    transcript.parley_cut()
    transcript.parley_delta("a1", " three.")
    transcript.parley_done()
    transcript.parley_cut()
    assert out.getvalue() == "parley: One, two, —\nparley: … three.\n"


def test_next_item_closes_the_one_before() -> None:
    transcript, out = plain()
    transcript.parley_delta("a1", "One.")
    transcript.parley_delta("a2", "Two.")
    transcript.close()
    assert out.getvalue() == "parley: One.\nparley: Two.\n"


def test_live_words_update_in_place() -> None:
    transcript, out = live()
    transcript.person_delta("u1", "watt")
    transcript.person_delta("u1", " tame")
    assert on_screen(out) == ["you: watt tame"]
    transcript.person_final("u1", "what time is it")
    transcript.parley_delta("a1", "It is")
    assert on_screen(out) == ["you: what time is it", "parley: It is"]
    transcript.parley_delta("a1", " noon.")
    transcript.parley_done()
    assert on_screen(out) == ["you: what time is it", "parley: It is noon.", ""]


def test_long_live_line_shows_its_end_in_one_row() -> None:
    transcript, out = live(columns=20)
    transcript.person_delta("u1", "one two three four five six")
    (line,) = on_screen(out)
    assert len(line) < 20
    assert line.startswith("you: …")
    assert line.endswith("five six")


def test_live_interruption() -> None:
    transcript, out = live()
    transcript.parley_delta("a1", "One, two ")
    transcript.parley_cut()
    transcript.person_delta("u1", "stop")
    transcript.parley_done()
    transcript.person_final("u1", "stop it")
    transcript.parley_delta("a2", "Sure.")
    transcript.close()
    assert on_screen(out) == ["parley: One, two —", "you: stop it", "parley: Sure.", ""]


def test_live_resume_after_a_false_interruption() -> None:
    transcript, out = live()
    transcript.parley_delta("a1", "One, two,")
    transcript.parley_cut()
    transcript.parley_delta("a1", " three.")
    transcript.close()
    assert on_screen(out) == ["parley: One, two, —", "parley: … three.", ""]


def test_final_text_that_comes_after_the_answer_began_is_repeated_only_if_it_differs() -> None:
    for final, lines in (
        ("hello", ["you: hello", "parley: Hi", ""]),
        ("hallo", ["you: hello", "parley: Hi", "you: hallo", ""]),
    ):
        transcript, out = live()
        transcript.person_delta("u1", "hello")
        transcript.parley_delta("a1", "Hi")
        transcript.person_final("u1", final)
        transcript.close()
        assert on_screen(out) == lines


def test_notices_and_noise_without_words() -> None:
    transcript, out = live()
    transcript.person_delta("u1", "hm")
    transcript.notice("connection lost")
    transcript.person_final("u2", "  ")
    transcript.close()
    assert on_screen(out) == ["you: hm", "[connection lost]", ""]


def test_a_server_cannot_steer_the_terminal() -> None:
    transcript, out = plain()
    transcript.person_final("u1", "a\x1b[2Jb")
    transcript.parley_delta("a1", "one\r\ntwo\x9b2J")
    transcript.close()
    transcript.notice("\x07")
    assert out.getvalue() == "you: a [2Jb\nparley: one  two 2J\n[ ]\n"
