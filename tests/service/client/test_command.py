"""The `atelier` command, as a process, against a small installation behind Envoy."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from pathlib import Path

import pytest
from atelier.media.v1.media_pb2 import FORMAT_PNG, FORMAT_WEBP
from atelier.task.v1.task_pb2 import Task

from mesh import errors
from tests.eventually import eventually
from tests.ports import free_port
from tests.service.client.conftest import HOST, PASSWORD, RESULT, Installation, Person


def photo(person: Person) -> Path:
    path = person.folder / "photo.jpg"
    path.write_bytes(b"\xff\xd8 photo")
    return path


def everything(terminal: int) -> str:
    """Read what a terminal shows until the last of its processes has ended, which Linux tells by an error."""
    shown = b""
    with contextlib.suppress(OSError), open(terminal, "rb", buffering=0) as stream:
        while chunk := stream.read(4096):
            shown += chunk
    return shown.decode()


async def test_the_main_job_is_two_commands(person: Person, installation: Installation) -> None:
    photo(person)
    await person.registers()

    code, out, err = await person.types("run", "resize", "photo.jpg", "--width", "800", "-o", "small.webp")

    assert (code, (person.folder / "small.webp").read_bytes()) == (0, RESULT)
    assert out.decode() == f"small.webp: {len(RESULT)} B\n"
    assert err.splitlines() == ["sending photo.jpg", "queued", "running: process", "receiving"]
    resize = installation.tasks["tsk_1"].operation.resize
    assert (resize.width, resize.format) == (800, FORMAT_WEBP)


async def test_a_run_may_have_a_deadline(person: Person, installation: Installation) -> None:
    photo(person)
    await person.registers()

    await person.types("run", "resize", "photo.jpg", "--width", "8", "--deadline", "90", "-o", "small.webp")

    assert installation.deadlines == {"tsk_1": 90}


def photos(person: Person) -> list[str]:
    (person.folder / "results").mkdir()
    for name in ("a.jpg", "b.png"):
        (person.folder / name).write_bytes(b"\xff\xd8 photo")
    return ["a.jpg", "b.png"]


async def test_several_files_are_one_batch_and_their_results_go_to_a_folder(
    person: Person, installation: Installation
) -> None:
    sources = photos(person)
    await person.registers()

    code, out, err = await person.types("run", "resize", *sources, "--width", "8", "-o", "results")

    assert code == 0, err
    assert out.decode() == f"results/a.webp: {len(RESULT)} B\nresults/b.webp: {len(RESULT)} B\n"
    assert {path.name for path in (person.folder / "results").iterdir()} == {"a.webp", "b.webp"}
    assert {"sending a.jpg", "sending b.png", "0 of 2 done", "2 of 2 done"} <= {*err.splitlines()}
    assert {task.batch_id for task in installation.tasks.values()} == {"bat_1"}


async def test_of_several_files_what_failed_is_told_and_the_rest_is_there(
    person: Person, installation: Installation
) -> None:
    sources = photos(person)
    installation.failing = True
    await person.registers()

    code, out, err = await person.types("run", "resize", *sources, "--width", "8", "-o", "results", "--json")

    answer = json.loads(out)
    assert (code, [each["output"] for each in answer["done"]]) == (1, ["results/a.webp"])
    assert [task["error"]["reason"] for task in answer["failed"]] == ["INPUT_DAMAGED"]
    assert json.loads(err)["details"][0]["reason"] == "TASKS_NOT_DONE"


async def test_an_interrupted_batch_is_cancelled(person: Person, installation: Installation) -> None:
    sources = photos(person)
    installation.held = True
    await person.registers()
    process = await person.start("run", "resize", *sources, "--width", "8", "-o", "results")
    await eventually(lambda: len(installation.tasks) == 2)

    person.interrupt(process)
    _, err = await process.communicate()

    assert process.returncode == 130, err
    assert {task.state for task in installation.tasks.values()} == {Task.STATE_CANCELLED}


async def test_a_detached_batch_is_followed_listed_and_cancelled_by_its_id(
    person: Person, installation: Installation
) -> None:
    sources = photos(person)
    await person.registers()

    code, out, _ = await person.types("run", "resize", *sources, "--width", "8", "--detach")
    cancelled, text, _ = await person.types("tasks", "cancel", "bat_1")
    _, listed, _ = await person.types("tasks", "--batch", "bat_1", "--json")

    assert (code, out.decode().splitlines()) == (0, ["bat_1", "Follow it with: atelier tasks watch bat_1"])
    assert (cancelled, text.decode().splitlines()[0]) == (0, "bat_1: 2 cancelled")
    assert len(json.loads(listed)["tasks"]) == 2


@pytest.mark.parametrize("sources", [["a.jpg"], ["a.jpg", "b.png"]])
async def test_a_watch_ends_as_what_is_watched_does(
    person: Person, installation: Installation, sources: list[str]
) -> None:
    photos(person)
    await person.registers()
    watched = "tsk_1" if len(sources) == 1 else "bat_1"
    codes, said = [], []

    for installation.failing in (False, True):
        installation.tasks.clear()
        installation.request_ids.clear()
        await person.types("run", "resize", *sources, "--width", "8", "--detach")
        code, _, err = await person.types("tasks", "watch", watched)
        codes.append(code)
        said.append(err.splitlines()[-1])
    installation.tasks.clear()
    installation.held = True
    await person.types("run", "resize", *sources, "--width", "8", "--detach")
    await person.types("tasks", "cancel", watched)
    codes.append((await person.types("tasks", "watch", watched))[0])

    assert codes == [0, 1, 1]
    assert ("INPUT_DAMAGED" if len(sources) == 1 else "1 of 2 tasks were not done. (TASKS_NOT_DONE)") in said[1]


async def test_several_files_need_a_folder_and_names_of_their_own(person: Person, installation: Installation) -> None:
    sources = photos(person)
    (person.folder / "a.png").write_bytes(b"photo")
    await person.registers()

    answers = [
        await person.types("run", "resize", *sources, "--width", "8", "-o", "small.webp"),
        await person.types("run", "resize", *sources, "--width", "8"),
        await person.types("run", "resize", "a.jpg", "a.png", "--width", "8", "-o", "results"),
    ]

    nothing = dict(installation.files)
    same = [installation.keep("photo.jpg", "image/jpeg", b"1").file_id for _ in range(2)]
    answers.append(await person.types("run", "resize", *same, "--width", "8", "-o", "results"))

    assert ([code for code, _, _ in answers], nothing, installation.tasks) == ([2, 2, 2, 2], {}, {})
    words = ("is not a folder", "-o FOLDER", "one name: a", "one name: photo")
    for (_, _, err), complaint in zip(answers, words, strict=True):
        assert complaint in err


async def test_no_result_replaces_what_is_worked_on(person: Person, installation: Installation) -> None:
    sources = photos(person)
    (person.folder / "a-2.webp").write_bytes(b"photo")
    (person.folder / "link.webp").symlink_to("a.jpg")
    sizes = _each("--sizes", ['{"width": 8, "format": "FORMAT_WEBP"}', '{"width": 9, "format": "FORMAT_WEBP"}'])
    await person.registers()

    answers = [
        await person.types("run", "resize", *sources, "--width", "8", "-o", "."),
        await person.types("run", "resize", "a.jpg", "--width", "8", "-o", "a.jpg"),
        await person.types("run", "resize", "a.jpg", "--width", "8", "-o", "link.webp"),
        await person.types("run", "watermark", "a.jpg", "--image", "b.png", "-o", "b.png"),
        await person.types("run", "thumbnails", "a.jpg", "a-2.webp", *sizes, "-o", "."),
        await person.types("run", "thumbnails", "a.jpg", "--sizes", '{"width": 8}', "-o", "a.jpg"),
    ]

    for (code, _, err), name in zip(
        answers, ("a.jpg", "a.jpg", "link.webp", "b.png", "a-2.webp", "a.jpg"), strict=True
    ):
        assert (code, f"may replace {name}," in err, "with -o" in err) == (2, True, True), err
    assert installation.files == {}
    assert [(person.folder / name).read_bytes() for name in sources] == [b"\xff\xd8 photo"] * 2


async def test_results_in_another_format_may_lie_beside_what_they_are_made_of(
    person: Person, installation: Installation
) -> None:
    sources = photos(person)
    (person.folder / "a.webp").write_bytes(b"an earlier result")
    await person.registers()

    code, _, err = await person.types("run", "resize", *sources, "--width", "8", "--format", "webp", "-o", ".")

    assert (code, [(person.folder / name).read_bytes() for name in ("a.webp", "b.webp")]) == (0, [RESULT] * 2), err
    assert [(person.folder / name).read_bytes() for name in sources] == [b"\xff\xd8 photo"] * 2


async def test_a_file_of_the_server_with_an_input_s_name_does_not_replace_it(
    person: Person, installation: Installation
) -> None:
    photo(person)
    (person.folder / "logo.png").write_bytes(b"\x89PNG logo")
    await person.registers()
    there = installation.keep("logo.png", "image/png", b"1").file_id

    code, _, err = await person.types(
        "run", "watermark", "photo.jpg", there, "--image", "logo.png", "-o", ".", "--format", "png"
    )

    assert (code, "may replace logo.png" in err, installation.tasks) == (2, True, {})


async def test_the_folder_of_the_results_is_made(person: Person, installation: Installation) -> None:
    sources = photos(person)
    await person.registers()

    code, _, err = await person.types("run", "resize", *sources, "--width", "8", "-o", "new")
    missing, _, complaint = await person.types("run", "resize", *sources, "--width", "8", "-o", "no/new")
    standard, _, _ = await person.types("run", "resize", *sources, "--width", "8", "-o", "-")

    assert (code, {path.name for path in (person.folder / "new").iterdir()}) == (0, {"a.webp", "b.webp"}), err
    assert (missing, "There is no folder" in complaint) == (2, True)
    assert (standard, (person.folder / "-").exists()) == (2, False)


async def test_on_a_terminal_the_bar_goes_and_the_answer_stays(person: Person) -> None:
    photo(person)
    await person.registers()
    ours, theirs = os.openpty()
    arguments = ("-m", "atelier_client.command", "run", "resize", "photo.jpg", "--width", "8", "-o", "small.webp")
    process = await asyncio.create_subprocess_exec(
        sys.executable, *arguments,
        cwd=person.folder, env={**person.environment(), "TERM": "xterm"}, stdout=theirs, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)

    shown = await asyncio.to_thread(everything, ours)
    code = await process.wait()

    assert code == 0
    assert "sending photo.jpg" in shown
    assert shown.endswith(f"small.webp: {len(RESULT)} B\r\n")


async def test_a_run_answers_programs_with_one_document(person: Person) -> None:
    photo(person)
    await person.registers()

    code, out, err = await person.types("run", "resize", "photo.jpg", "--width", "8", "-o", "b.png", "--json")

    answer = json.loads(out)
    assert (code, err, answer["output"], answer["task"]["state"]) == (0, "", "b.png", "STATE_SUCCEEDED")
    assert answer["file"]["sizeBytes"] == str(len(RESULT))


async def test_several_results_are_numbered_beside_each_other(person: Person, installation: Installation) -> None:
    photo(person)
    await person.registers()
    sizes = ("--sizes", '{"width": 8}', "--sizes", '{"width": 9}')

    code, out, err = await person.types("run", "thumbnails", "photo.jpg", *sizes, "-o", "small.jpg")
    refused, _, complaint = await person.types("run", "thumbnails", "photo.jpg", *sizes, "-o", "-")

    assert (code, out.decode()) == (0, "".join(f"small-{n}.webp: {len(RESULT)} B\n" for n in (1, 2))), err
    assert [(person.folder / f"small-{n}.webp").read_bytes() for n in (1, 2)] == [RESULT, RESULT]
    assert [each.width for each in installation.tasks["tsk_1"].operation.thumbnails.sizes] == [8, 9]
    assert (refused, "There will be 2 results" in complaint, len(installation.tasks)) == (2, True, 1)


async def test_an_extension_says_the_format_of_each_of_several_results_that_has_none(
    person: Person, installation: Installation
) -> None:
    photo(person)
    await person.registers()
    sizes = ['{"width": 8}', '{"width": 9, "format": "FORMAT_PNG"}']
    steps = ("--steps", '{"resize": {"width": 8}}')

    await person.types("run", "thumbnails", "photo.jpg", *_each("--sizes", sizes), "-o", "small.webp")
    await person.types("run", "pipeline", "photo.jpg", *steps, *_each("--thumbnails", sizes), "-o", "small.webp")
    unknown, _, complaint = await person.types("run", "thumbnails", "photo.jpg", "--sizes", sizes[0], "-o", "small.bmp")

    alone, ended = (installation.tasks[task_id].operation for task_id in ("tsk_1", "tsk_2"))
    assert [each.format for each in alone.thumbnails.sizes] == [FORMAT_WEBP, FORMAT_PNG]
    assert [each.format for each in ended.pipeline.thumbnails.sizes] == [FORMAT_WEBP, FORMAT_PNG]
    assert (unknown, "No format goes by .bmp" in complaint, len(installation.tasks)) == (2, True, 2)


def _each(option: str, values: list[str]) -> list[str]:
    return [word for value in values for word in (option, value)]


async def test_an_extension_says_the_format_of_the_end_that_was_chosen(
    person: Person, installation: Installation
) -> None:
    photo(person)
    await person.registers()
    steps = ("run", "pipeline", "photo.jpg", "--steps", '{"resize": {"width": 8}}', "-o", "small.webp")

    await person.types(*steps)
    await person.types(*steps, "--compress", "5000")

    converted, compressed = (installation.tasks[task_id].operation.pipeline for task_id in ("tsk_1", "tsk_2"))
    assert (converted.WhichOneof("end"), converted.convert.format) == ("convert", FORMAT_WEBP)
    assert (compressed.compress.max_bytes, compressed.compress.format) == (5000, FORMAT_WEBP)


async def test_a_result_goes_to_standard_output_untouched(person: Person) -> None:
    photo(person)
    await person.registers()

    code, out, _ = await person.types("run", "convert", "photo.jpg", "--format", "avif", "-o", "-")

    assert (code, out) == (0, RESULT)


async def test_a_result_goes_to_a_pipe_by_its_name_and_to_a_file_with_the_longest_one(person: Person) -> None:
    photo(person)
    await person.registers()
    name = f"{'画' * 83}.webp"  # 254 bytes of the 255 that a file's name may have

    _, piped, err = await person.types("run", "convert", "photo.jpg", "--format", "webp", "-o", "/dev/stdout")
    code, _, _ = await person.types("run", "resize", "photo.jpg", "--width", "8", "-o", name)

    assert piped.startswith(RESULT), err
    assert (code, (person.folder / name).read_bytes()) == (0, RESULT)


@pytest.mark.parametrize("failure", [errors.Unavailable("Away."), errors.Aborted("Given up; send it again.")])
async def test_a_run_bears_a_storage_that_fails_for_a_moment(
    person: Person, installation: Installation, failure: errors.MeshError
) -> None:
    photo(person)
    await person.registers()

    installation.bytes_failures = [failure, failure]
    code, _, err = await person.types("run", "resize", "photo.jpg", "--width", "8", "-o", "small.webp")

    assert (code, len(installation.files), installation.bytes_failures) == (0, 2, []), err


async def test_who_cannot_keep_the_result_is_told_what_was_done(person: Person) -> None:
    photo(person)
    await person.registers()

    code, _, err = await person.types("run", "resize", "photo.jpg", "--width", "8", "-o", "/dev/full")
    refused, _, told = await person.types("--json", "run", "resize", "photo.jpg", "--width", "8", "-o", "/dev/full")

    expected = [
        "atelier: No space left on device. (FILE_UNUSABLE)",
        "What became of the work: atelier tasks show tsk_1",
    ]
    assert (code, err.splitlines()[-2:]) == (1, expected)
    assert (refused, json.loads(told)["notes"]) == (1, ["What became of the work: atelier tasks show tsk_2"])


async def test_what_cannot_be_sent_is_refused_with_a_reason(person: Person, installation: Installation) -> None:
    await person.registers()
    os.mkfifo(person.folder / "pipe")
    (Path(os.fsdecode(os.fsencode(person.folder) + b"/caf\xe9.jpg"))).write_bytes(b"image")

    keeping = os.open(person.folder / "pipe", os.O_RDWR)  # else who opens it waits for a writer
    piped, _, no_file = await person.types("files", "upload", "pipe")
    os.close(keeping)
    named, _, no_name = await person.types("files", "upload", os.fsdecode(b"caf\xe9.jpg"))

    assert (piped, "pipe is no regular file" in no_file) == (1, True), no_file
    assert (named, "is not in UTF-8" in no_name, installation.files) == (1, True, {}), no_name


async def test_a_mark_that_is_a_path_is_sent_first(person: Person, installation: Installation) -> None:
    photo(person)
    (person.folder / "logo.png").write_bytes(b"\x89PNG logo")
    await person.registers()

    code, _, err = await person.types("run", "watermark", "photo.jpg", "--image", "logo.png", "-o", "marked.jpg")

    assert code == 0, err
    task = installation.tasks["tsk_1"]
    names = [installation.files[each][0].name for each in (task.operation.watermark.image.file_id, task.input_file_id)]
    assert names == ["logo.png", "photo.jpg"]


async def test_an_interrupted_run_cancels_its_task_and_says_so(person: Person, installation: Installation) -> None:
    installation.held = True
    photo(person)
    await person.registers()
    process = await person.start("run", "resize", "photo.jpg", "--width", "8", "-o", "small.webp")
    await eventually(lambda: [task for task in installation.tasks.values() if task.state == Task.STATE_RUNNING])

    person.interrupt(process)
    _, err = await process.communicate()

    assert (process.returncode, installation.tasks["tsk_1"].state) == (130, Task.STATE_CANCELLED)
    assert "the task tsk_1 is cancelled" in err.decode()
    assert sorted(each.name for each in person.folder.iterdir()) == ["config", "photo.jpg"]


async def test_a_detached_run_says_what_to_type_next(person: Person) -> None:
    photo(person)
    await person.registers()

    code, out, _ = await person.types("run", "resize", "photo.jpg", "--width", "8", "--detach")
    watched, _, _ = await person.types("tasks", "watch", "tsk_1")

    assert (code, out.decode().splitlines()) == (0, ["tsk_1", "Follow it with: atelier tasks watch tsk_1"])
    assert watched == 0


async def test_what_is_incomplete_is_refused_before_anything_is_sent(
    person: Person, installation: Installation
) -> None:
    photo(person)
    await person.registers()

    code, _, err = await person.types("run", "resize", "photo.jpg", "-o", "small.webp")

    assert (code, installation.files) == (2, {})
    assert "Give --width or --height." in err


async def test_a_failed_task_is_exit_code_1_with_its_reason(person: Person, installation: Installation) -> None:
    installation.failing = True
    photo(person)
    await person.registers()

    code, _, err = await person.types("run", "resize", "photo.jpg", "--width", "8", "-o", "small.webp")

    assert code == 1
    assert err.splitlines()[-2:] == [
        "atelier: The image is damaged. (INPUT_DAMAGED)",
        "What became of the work: atelier tasks show tsk_1",
    ]


async def test_the_server_that_is_typed_wins_over_the_environment_s(person: Person) -> None:
    first, _, before = await person.types("--server", "http://127.0.0.1:9", "tasks", "show", "tsk_1")
    last, _, after = await person.types("whoami", "--server", "http://127.0.0.1:9")

    assert "http://127.0.0.1:9" in before, before
    assert (first, last, before) == (3, 3, after)


async def test_who_is_not_signed_in_is_told_how(person: Person) -> None:
    code, _, err = await person.types("whoami")

    assert code == 3
    assert "(NOT_SIGNED_IN)\nSign in: atelier login" in err


async def test_errors_for_programs_are_refusals_on_standard_error(person: Person) -> None:
    await person.registers()

    code, out, err = await person.types("--json", "tasks", "show", "tsk_none")

    refusal = json.loads(err)
    assert (code, out, refusal["code"], refusal["details"][0]["reason"]) == (1, b"", 5, "TASK_NOT_FOUND")


async def test_a_wrong_password_is_a_refusal(person: Person) -> None:
    code, _, err = await person.types("login", "--username", "ada", "--password-stdin", stdin=b"guess\n")

    assert code == 1
    assert "(CREDENTIALS_INVALID)\nCheck name and password" in err


async def test_without_a_terminal_nothing_is_asked(person: Person) -> None:
    code, _, err = await person.types("login")

    assert code == 2
    assert "Give --username" in err


async def test_two_commands_at_once_refresh_once(person: Person, installation: Installation) -> None:
    await person.registers()
    installation.expire_tokens()

    codes = [code for code, _, _ in await asyncio.gather(*(person.types("whoami") for _ in range(3)))]

    assert (codes, installation.refreshes) == ([0, 0, 0], 1)


async def test_lists_and_quota_read_as_tables_and_as_documents(person: Person, installation: Installation) -> None:
    await person.registers()
    installation.keep("photo.jpg", "image/jpeg", b"1234")

    _, files, _ = await person.types("files")
    _, tasks, _ = await person.types("tasks", "--state", "queued", "--json")
    _, quota, _ = await person.types("quota")

    assert files.decode().splitlines()[1].split()[:4] == ["fil_1", "4", "B", "image/jpeg"]
    assert json.loads(tasks) == {"tasks": []}
    assert "tasks this month  2" in quota.decode()


async def test_files_are_sent_fetched_and_deleted(person: Person, installation: Installation) -> None:
    photo(person)
    await person.registers()

    _, sent, _ = await person.types("files", "upload", "photo.jpg", "--json")
    fetched, _, _ = await person.types("files", "download", json.loads(sent)["file"]["fileId"], "-o", "copy.jpg")
    deleted, _, _ = await person.types("files", "delete", "fil_1")

    assert (fetched, deleted, installation.files) == (0, 0, {})
    assert (person.folder / "copy.jpg").read_bytes() == photo(person).read_bytes()


async def test_an_image_is_fetched_at_another_size_in_the_format_of_its_name(person: Person) -> None:
    await person.registers()

    done, _, _ = await person.types("files", "render", "fil_1", "-o", "small.webp", "--width", "64", "--fit", "fill")
    wrong, _, said = await person.types("files", "render", "fil_1", "-o", "small.webp", "--width", "4097")

    assert (done, (person.folder / "small.webp").read_text()) == (0, "width=64&fit=fill&format=webp")
    assert (wrong, "4096" in str(said)) == (2, True)


async def test_a_url_that_needs_no_token_is_printed(person: Person) -> None:
    await person.registers()

    code, said, _ = await person.types("files", "url", "fil_1", "--render", "width=64", "--seconds", "60")

    assert (code, "/fil_1/width=64/60" in said.decode()) == (0, True)


async def test_the_first_administrator_comes_by_the_secret_and_has_the_role_at_once(
    person: Person, installation: Installation
) -> None:
    await person.registers()
    (person.folder / "admin").write_text("installation\n")

    code, out, err = await person.types("admin", "grant", "ada", "--secret-file", "admin")
    limits, _, _ = await person.types("admin", "set-limits", "usr_ada", "--tasks", "5")

    assert (code, limits, installation.refreshes) == (0, 0, 1), err
    assert "ada is an administrator now" in out.decode()


async def test_the_mesh_is_shown_to_people_and_to_programs(person: Person) -> None:
    await person.registers()

    _, status, _ = await person.types("mesh", "status")
    _, why, _ = await person.types("mesh", "why", "task")
    _, config, _ = await person.types("mesh", "config", "--json")
    unknown, _, complaint = await person.types("mesh", "why", "tusk")

    assert "critical" in status.decode()
    (calls,) = [line.split() for line in status.decode().splitlines() if "task (1)" in line]
    assert calls == ["user", "task", "(1)", "auth"]
    assert "Degraded: task-1. No worker serves" in status.decode()
    assert "A fault is injected into task" in status.decode()
    assert "control-2" in status.decode()
    (endpoint,) = [line.split() for line in why.decode().splitlines() if line.startswith("task-1")]
    assert endpoint[:3] == ["task-1", "127.0.0.1:9000", "critical"]
    assert endpoint[-7:] == ["process", "7,", "agent", "here", "no", "connection", "refused"]
    assert "endpoints task  v1   v2      waiting" in why.decode()
    assert [line.split()[:3] for line in why.decode().splitlines() if "denied by an intention" in line] == [
        ["user", "auth", "IssueTokens"]
    ]
    (instance,) = json.loads(config)["instances"]
    assert instance["settings"] == {"attempts": 3, "log_level": "INFO"}
    assert instance["refusal"] == "attempts: too many"
    assert (unknown, "SERVICE_UNKNOWN" in complaint) == (1, True)


async def test_a_webhook_is_set_shown_and_deleted(person: Person) -> None:
    await person.registers()

    none, _, hint = await person.types("webhook", "show")
    _, made, _ = await person.types("webhook", "set", "https://example.com/hook")
    _, shown, _ = await person.types("webhook", "show", "--json")
    _, rotated, _ = await person.types("webhook", "rotate-secret")
    _, _, _ = await person.types("webhook", "delete")
    _, left, _ = await person.types("webhook", "show")

    assert (none, hint.splitlines()[-1]) == (1, "Name a URL: atelier webhook set URL")
    assert made.decode() == "https://example.com/hook\nsecret whsec_1\n"
    assert json.loads(shown)["webhook"]["secret"] == "whsec_1"
    assert rotated.decode() == "https://example.com/hook\nsecret whsec_2\n"
    assert left.decode().startswith("Only tasks name URLs.")


async def test_deliveries_are_listed_and_sent_again(person: Person) -> None:
    await person.registers()

    _, listed, _ = await person.types("webhook", "deliveries", "--task", "tsk_7", "--limit", "2")
    _, again, _ = await person.types("webhook", "resend", "whd_3")

    rows = [line.split() for line in listed.decode().splitlines()]
    assert rows[1:] == [
        ["whd_3", "tsk_7", "TaskFailed", "failed", "3", "410", "GONE"],
        ["whd_2", "tsk_7", "TaskFailed", "failed", "2", "410", "GONE"],
    ]
    assert again.decode() == "whd_3 is pending.\n"


async def test_a_detached_run_may_name_a_webhook(person: Person, installation: Installation) -> None:
    photo(person)
    await person.registers()
    run = ("run", "resize", "photo.jpg", "--width", "8", "--webhook", "https://example.com/hook")

    waiting, _, _ = await person.types(*run, "-o", "small.webp")
    detached, _, _ = await person.types(*run, "--detach")

    assert (waiting, detached) == (2, 0)
    assert installation.webhook_urls == {"tsk_1": "https://example.com/hook"}


async def test_dead_letters_are_listed_and_redriven(person: Person) -> None:
    await person.registers()

    _, listed, _ = await person.types("tasks", "dead-letters", "--reason", "STORAGE_AWAY")
    by_reason, all_, _ = await person.types("tasks", "redrive", "--reason", "WORKER_LOST", "--json")
    by_id, told, _ = await person.types("tasks", "redrive", "tsk_8", "tsk_9")
    neither, _, _ = await person.types("tasks", "redrive")

    assert listed.decode().splitlines()[1].split()[:4] == ["tsk_9", "usr_ada", "STORAGE_AWAY", "3"]
    assert (by_reason, json.loads(all_)["taskIds"]) == (0, ["tsk_0", "tsk_1", "tsk_2"])
    assert (by_id, told.decode().splitlines()) == (1, ["1 queued again.", "tsk_8: All used. (QUOTA_EXCEEDED)"])
    assert neither == 2


async def test_tasks_are_compared_with_their_events_and_mended(person: Person) -> None:
    await person.registers()

    compared, told, _ = await person.types("tasks", "replay")
    mended, answer, _ = await person.types("tasks", "replay", "--rebuild", "--json")

    assert (compared, told.decode().splitlines()) == (
        1,
        [
            "tsk_8: missing",
            "tsk_9: state, turn",
            "202 tasks compared with their events, 2 differ.",
            "1 more have no events, or older ones without all facts, and were left alone.",
            "atelier tasks replay --rebuild mends them.",
        ],
    )
    assert (mended, json.loads(answer)["rebuilt"]) == (0, True)


async def test_quotas_are_audited(person: Person, installation: Installation) -> None:
    await person.registers()

    well, said, _ = await person.types("quota", "audit")
    installation.full = True
    wrong, told, _ = await person.types("quota", "audit")

    assert (well, said.decode()) == (0, "Drift 0. 3 reservations compared with their tasks, 0 differ.\n")
    assert (wrong, told.decode().splitlines()) == (
        1,
        [
            "usr_ada, tasks 2026-11: counted 2 used + 1 reserved, ledger 1 used + 0 reserved, reservations 0 used + 0 reserved",  # noqa: E501 - one line of output
            "tsk_1/1: is BOUND, its task wants it SETTLED",
            "Drift 1. 51 reservations compared with their tasks, 1 differ.",
        ],
    )


async def test_logging_out_forgets_the_session(person: Person, installation: Installation) -> None:
    await person.registers()

    code, _, _ = await person.types("logout")

    assert (code, installation.refresh_tokens) == (0, set())
    assert (await person.types("whoami"))[0] == 3


async def test_the_doctor_finds_all_well(person: Person) -> None:
    await person.registers()

    code, out, err = await person.types("doctor", "--json")

    answer = json.loads(out)
    assert (code, answer["ok"]) == (0, True), err
    names = [check["name"] for check in answer["checks"]]
    assert names == ["credentials", "server", "services", "version", "clock", "account"]
    assert all(check["ok"] for check in answer["checks"])


async def test_the_doctor_names_what_is_wrong_and_how_to_mend_it(person: Person, installation: Installation) -> None:
    await person.registers()
    installation.ready = False
    credentials = person.folder / "config" / "atelier" / "credentials.json"
    credentials.chmod(0o644)

    code, out, _ = await person.types("doctor")

    assert code == 1
    assert "waiting for media" in out.decode()
    assert "mode 0644" in out.decode()
    assert credentials.stat().st_mode & 0o777 == 0o600


async def test_a_server_that_is_not_there_is_exit_code_4(person: Person) -> None:
    person.url = f"http://{HOST}:{free_port()}"

    code, _, err = await person.types("login", "--username", "ada", "--password-stdin", stdin=PASSWORD.encode())
    doctor, out, _ = await person.types("doctor")

    assert code == 4
    assert "(SERVER_UNREACHABLE)\natelier doctor finds out why" in err
    assert (doctor, "WRONG server" in out.decode()) == (1, True)
