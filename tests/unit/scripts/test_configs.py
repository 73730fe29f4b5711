"""Secrets and settings that are written for the programs."""

from __future__ import annotations

import pwd
import signal
import stat

import pytest
from supervisor.options import ServerOptions

from scripts.local import configs, postgresql
from scripts.local.layout import MARKER, Layout, Process, SettingRefused
from scripts.local.programs import CannotStart

KEYS = dict.fromkeys(("consul.registrar", "connect.id", "connect.pem", "connect.key"), "s3cret")


@pytest.fixture
def mesh(tmp_path):
    mesh = Layout(var=tmp_path / "var")
    configs.make_folders(mesh)
    return mesh


def as_supervisord_reads_it(mesh: Layout, process: Process, fingerprint: str = ""):
    path = mesh.configs / "supervisord.conf"
    path.write_text(configs.supervisord(mesh, [process], {process.name: fingerprint}))
    options = ServerOptions()
    options.realize(["-c", str(path)])
    return options.process_group_configs[0].process_configs[0]


def process(**environment: str) -> Process:
    return Process(name="task-1", wave=2, command=("python", "-m", "services.task"), environment=environment)


def test_secrets_are_drawn_once_and_only_this_user_reads_them(mesh):
    first = configs.make_secrets(mesh)
    second = configs.make_secrets(mesh)

    assert first == second
    assert len(set(first.values())) == len(first)
    assert stat.S_IMODE(mesh.secrets.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in mesh.secrets.iterdir()} == {0o600}


def test_supervisord_passes_on_awkward_values_unharmed(mesh):
    awkward = {"A": "a,b=c;d", "B": "100%", "C": '{"a": 1}', "D": "", "E": "sqlite:////x y.db", MARKER: str(mesh.var)}

    read = as_supervisord_reads_it(mesh, process(**awkward))

    assert {name: read.environment[name] for name in awkward} == awkward


def test_a_value_that_supervisord_cannot_hold_is_refused_by_name(mesh):
    with pytest.raises(SettingRefused, match="TASK_MOTTO"):
        configs.supervisord(mesh, [process(TASK_MOTTO="""both ' and " """)], {})


def test_a_dead_program_comes_back_and_ends_with_its_supervisor(mesh):
    read = as_supervisord_reads_it(mesh, process())

    assert read.command == "setpriv --pdeathsig TERM -- python -m services.task"
    assert read.autorestart
    assert read.killasgroup


def test_new_code_is_a_new_program_to_supervisord(mesh):
    old, same, new = (as_supervisord_reads_it(mesh, process(), each) for each in ("1", "1", "2"))

    assert old == same
    assert old != new


def test_a_fingerprint_follows_content_and_names_only(tmp_path):
    (tmp_path / "a.py").write_text("1")
    before = configs.fingerprint([str(tmp_path)])

    (tmp_path / "a.py").write_text("1")
    same = configs.fingerprint([str(tmp_path)])
    (tmp_path / "a.py").write_text("2")
    edited = configs.fingerprint([str(tmp_path)])
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    renamed = configs.fingerprint([str(tmp_path)])

    assert before == same
    assert len({before, edited, renamed}) == 3


def test_consul_is_told_of_a_port_only_when_it_knows_it(mesh):
    assert "grpc_tls" not in configs.consul(mesh, (1, 8), KEYS)["ports"]
    assert configs.consul(mesh, (1, 14), KEYS)["ports"]["grpc_tls"] == -1


def test_brokers_and_the_edge_listen_on_loopback_only(mesh):
    settings = configs.consul(mesh, (1, 8), KEYS)

    assert (settings["bind_addr"], settings["client_addr"]) == ("127.0.0.1", "127.0.0.1")
    assert f"listeners.tcp.1 = 127.0.0.1:{mesh.broker_port}\n" in configs.rabbitmq(mesh, "s3cret")
    assert configs.envoy(mesh)["admin"]["address"]["socket_address"]["address"] == "127.0.0.1"


def test_a_wiped_consul_comes_back_as_the_same_authority_and_trusts_nobody_without_a_token(mesh):
    keys = configs.make_secrets(mesh)

    settings = configs.consul(mesh, (1, 8), keys)

    assert settings["acl"]["default_policy"] == "deny"
    assert settings["acl"]["tokens"]["master"] == keys["consul.registrar"]
    assert settings["connect"]["ca_config"]["cluster_id"] == keys["connect.id"]
    assert settings["connect"]["ca_config"]["root_cert"] == (mesh.secrets / "connect.pem").read_text()
    assert "initial_management" in configs.consul(mesh, (1, 14), keys)["acl"]["tokens"]


def test_a_program_may_run_as_another_user_and_end_by_a_signal_of_its_own(mesh):
    server = Process(name="postgresql", wave=0, command=("postgres",), environment={}, user="nobody", stop_signal="INT")

    read = as_supervisord_reads_it(mesh, server)

    assert (read.uid, read.stopsignal) == (pwd.getpwnam("nobody").pw_uid, signal.SIGINT)


def test_a_folder_that_lets_only_its_owner_in_is_named_before_postgresql_fails_in_it(tmp_path):
    (tmp_path / "closed" / "var").mkdir(parents=True)
    (tmp_path / "closed").chmod(0o700)

    with pytest.raises(CannotStart, match=r"chmod o\+x /"):
        postgresql.require_enterable(tmp_path / "closed" / "var", "nobody")
