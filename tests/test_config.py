"""What a user writes is read exactly, or refused with the path, the reason and the way out."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import atrax
from atrax import Config, UsageError

NOTHING: dict[str, str] = {}


def load(config: Any, environ: dict[str, str] = NOTHING, **overrides: Any) -> Config:
    text = config if isinstance(config, str) else json.dumps(config)
    return Config.load(text, environ, overrides)


def server(**keys: Any) -> dict[str, Any]:
    return {"mcpServers": {"git": {"command": "git-mcp", **keys}}}


HASH = "sha256:" + 64 * "a"
TOKEN = {"name": "a", "hash": HASH}


def tokens(*entries: dict[str, Any], **auth: Any) -> dict[str, Any]:
    return {**server(), "auth": {"type": "token", "tokens": list(entries), **auth}}


def errors(config: Any, environ: dict[str, str] = NOTHING, **overrides: Any) -> list[str]:
    with pytest.raises(UsageError) as caught:
        load(config, environ, **overrides)
    return str(caught.value).splitlines()


def test_the_defaults_are_those_of_the_design() -> None:
    config = load(server())

    git = config.servers["git"]
    assert (config.host, config.port, config.separator, config.drain) == (
        "127.0.0.1",
        4000,
        "__",
        10,
    )
    assert (config.limits.body, config.limits.depth, config.limits.park) == (4 * 2**20, 200, 300)
    assert (git.protocol, git.prefix, git.isolation) == ("auto", "git", "shared")
    assert (git.processes, git.concurrency, git.timeout) == (4, None, 60)
    assert git.offer == ["elicitation", "sampling"]
    assert git.restart.backoff == (0.2, 30.0)


def test_a_config_of_a_desktop_client_works_as_it_is() -> None:
    config = load(
        {
            "globalShortcut": "",
            "preferences": {"theme": "dark"},
            "mcpServers": {
                "one": {"type": "stdio", "command": "a", "autoApprove": ["x"], "timeout": 30},
                "two": {"command": "b", "disabledTools": ["delete_*"], "alwaysAllow": []},
                "far": {"type": "http", "url": "https://example.com/mcp", "headers": {}},
                "my server": {"command": "c", "disabled": True},
                "my-server": {"command": "d"},
            },
        }
    )

    assert list(config.servers) == ["one", "two", "my-server-2", "my-server"]
    assert config.servers["two"].tools.deny == ["delete_*"]
    assert config.servers["one"].timeout == 30
    for told in ("globalShortcut", "preferences", "autoApprove", "alwaysAllow", "disabledTools"):
        assert any(told in remark for remark in config.remarks), told
    assert any("mcpServers.far: skipped" in remark for remark in config.remarks)
    assert any('mcpServers["my server"]: is called my-server-2' in r for r in config.remarks)


@pytest.mark.parametrize("word", ["servers", "context_servers"])
def test_the_servers_of_vs_code_and_zed_are_read(word: str) -> None:
    config = load({word: {"git": {"type": "stdio", "command": "git-mcp"}}, "inputs": []})

    assert config.servers["git"].command == "git-mcp"


def test_an_env_file_is_read_and_env_wins(tmp_path: Path) -> None:
    (tmp_path / "dot.env").write_text("# note\nexport A=\"one two\"\nB='b'\n\nC=c\n")
    (tmp_path / "config.json").write_text(json.dumps(server(envFile="dot.env", env={"C": "mine"})))

    config = Config.load(tmp_path / "config.json", NOTHING)

    assert config.servers["git"].env == {"A": "one two", "B": "b", "C": "mine"}


# Each row: what is written, and what must stand in one line of the answer.
MISTAKES = {
    "typo": (server(comand="x"), 'mcpServers.git.comand: unknown key. Did you mean "command"?'),
    "top typo": ({**server(), "prot": 1}, 'prot: unknown key. Did you mean "port"?'),
    "wrong place": ({**server(), "idle_stop": 1}, "idle_stop: unknown key. It belongs to mcpServers"),
    "nested typo": ({**server(), "limits": {"bodi": 1}}, 'limits.bodi: unknown key. Did you mean "body"?'),
    "field of ours": ({**server(), "secrets": []}, "secrets: unknown key"),
    "wrong type": (server(args=["a", 1]), "mcpServers.git.args[1]: must be a valid string"),
    "port as text": ({**server(), "port": "4000"}, "port: must be a valid integer"),
    "port range": ({**server(), "port": 70000}, "port: must be less than or equal to 65535"),
    "no bool": (server(disabled=1), "mcpServers.git.disabled: must be a valid boolean"),
    "null": (server(args=None), "mcpServers.git.args: must be a valid list"),
    "no command": ({"mcpServers": {"a": {}}}, "mcpServers.a.command: is missing"),
    "server is text": ({"mcpServers": {"a": "x"}}, "mcpServers.a: must be an object"),
    "server is null": ({"mcpServers": {"a": None}}, "mcpServers.a: must be an object"),
    "no servers": ({"port": 1}, "mcpServers: is missing"),
    "missing variable": (server(args=["-t", "${TOKEN}"]), "mcpServers.git.args[1]: the variable TOKEN"),
    "strange reference": (server(args=["${input:key}"]), 'args[0]: "${input:key}" is not understood'),
    "open reference": (server(args=["${TOKEN"]), 'args[0]: "${" without "}"'),
    "missing file": (server(env={"A": "${file:/nope}"}), "mcpServers.git.env.A: cannot read /nope"),
    "endless file": (server(env={"A": "${file:/dev/zero}"}), "env.A: cannot read /dev/zero"),
    "protocol": (server(protocol="modren"), "mcpServers.git.protocol: must be 'auto', 'legacy' or 'modern'"),
    "offer": (server(offer=["elicit"]), "mcpServers.git.offer[0]: must be 'elicitation', "),
    "shared roots": (server(offer=["roots"]), 'offer: "roots" with isolation "shared" needs "paths"'),
    "milliseconds": (server(timeout=600000), "timeout 600000 is more than max_timeout 3600"),
    "no process": (server(processes=0), "mcpServers.git.processes: must be greater than or equal to 1"),
    "zero timeout": (server(timeout=0), "mcpServers.git.timeout: must be greater than 0"),
    "backoff shape": (server(restart={"backoff": [1]}), "mcpServers.git.restart.backoff"),
    "bundled": (server(command="bundled:note"), 'no such bundled server: "note". Did you mean "notes"?'),
    "nul": (server(args=["a\0b"]), "mcpServers.git.args[0]: String should match"),
    "variable name": (server(env={"A=B": "x"}), 'mcpServers.git.env["A=B"]: String should match'),
    "prefix": (server(prefix="a b"), "mcpServers.git.prefix: String should match pattern"),
    "open host": ({**server(), "host": "0.0.0.0"}, 'host: "0.0.0.0" can be reached from other machines'),
    "host by name": ({**server(), "host": "localhost.evil.example"}, "can be reached from other"),
    "auth without type": ({**server(), "host": "::", "auth": {}}, 'host: "::" can be reached'),
    "no tokens": ({**server(), "auth": {"type": "token"}}, "auth.tokens: nobody could come in; python atrax.pyz token NAME"),
    "unknown auth": ({**server(), "auth": {"type": "x"}}, "auth.type: must be 'none'"),
    "auth of another type": ({**server(), "auth": {"tokens": [TOKEN]}}, 'auth.tokens: belongs to "type": "token"'),
    "unsafe token": (tokens(TOKEN, unsafe=True), 'auth.unsafe: belongs to "type": "none"'),
    "token typo": (tokens({**TOKEN, "sever": []}), 'auth.tokens[0].sever: unknown key. Did you mean "servers"?'),
    "token without name": (tokens({"hash": HASH}), "auth.tokens[0].name: is missing"),
    "token twice": (tokens(TOKEN, {"name": "a", "token": "x" * 16}), 'auth.tokens[1].name: "a" is the name of another token'),
    "same token": (tokens(TOKEN, {**TOKEN, "name": "b"}), 'auth.tokens[1]: the same token as that of "a"'),
    "hash and token": (tokens({**TOKEN, "token": "x" * 16}), 'auth.tokens[0]: needs either "hash" or "token"'),
    "neither": (tokens({"name": "a"}), 'auth.tokens[0]: needs either "hash" or "token"'),
    "short token": (tokens({"name": "a", "token": "x" * 15}), "auth.tokens[0].token: String should have at least 16"),
    "no hash": (tokens({"name": "a", "hash": "sha256:12"}), 'auth.tokens[0].hash: must be "sha256:" and 64 hex digits'),
    "other hash": (tokens({"name": "a", "hash": "md5:" + 64 * "a"}), 'auth.tokens[0].hash: must be "sha256:"'),
    "expires": (tokens({**TOKEN, "expires": "tomorrow"}), 'auth.tokens[0].expires: must be a time, as "2030-12-31"'),
    "expires as number": (tokens({**TOKEN, "expires": 5}), "auth.tokens[0].expires: must be a time"),
    "missing secret": (tokens({"name": "a", "token": "${NOPE}"}), "auth.tokens[0].token: the variable NOPE is not set"),
    "servers of a token": (tokens({**TOKEN, "servers": ["gti"]}), 'auth.tokens[0].servers[0]: there is no server "gti". Did you mean "git"?'),
    "glob of all": (tokens({**TOKEN, "tools": ["*"]}), '"*" is of no server: write "git__*", or leave "tools" out for all'),
    "glob of none": (tokens({**TOKEN, "tools": ["git__a", "gi*"]}), 'auth.tokens[0].tools[1]: "gi*" is of no server'),
    "sandbox": (
        server(sandbox={"raed": []}),
        'mcpServers.git.sandbox.raed: unknown key. Did you mean "read"?',
    ),
    "pin": (server(pin="yes"), "mcpServers.git.pin: must be"),
    "origin": ({**server(), "allowed_origins": ["app.example"]}, "allowed_origins[0]:"),
    "short key": ({**server(), "key": "short"}, "key: String should have at least 16 characters"),
}  # fmt: skip


@pytest.mark.parametrize(("config", "told"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named_with_its_path(config: Any, told: str) -> None:
    assert any(told in line for line in errors(config))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"mcpServers": {}, "port": 1, "port": 2}', '"port" is written twice'),
        (
            '{"mcpServers": {"a": {"command": "x", "command": "y"}}}',
            '"command" is written twice',
        ),
        ('{"mcpServers": {}, // no\n}', "not valid JSON"),
        ('{"mcpServers": {},}', "no comma at an end"),
        ('{"mcpServers": {}, "drain": NaN}', "drain: must be a finite number"),
        ('{"a": ' * 100_000, "not valid JSON"),
    ],
)
def test_json_is_read_strictly(text: str, told: str) -> None:
    assert any(told in line for line in errors(text))


def test_all_mistakes_are_told_at_once() -> None:
    config = {
        "prot": 1,
        "mcpServers": {
            "a": {"command": "x", "args": ["${NOPE}"], "prefix": "p", "timeout": "long"},
            "b": {"command": "y", "prefix": "p", "pin": "yes"},
        },
    }

    lines = errors(config)

    assert len(lines) == 4


def test_two_servers_with_one_prefix_are_refused() -> None:
    one = {"command": "x", "prefix": "p"}

    assert errors({"mcpServers": {"a": one, "b": one}}) == [
        'config: mcpServers.b.prefix: "p" is the prefix of "a" too'
    ]


def test_the_message_begins_with_the_file_as_the_user_named_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text('{"mcpServers": {"git": {"comand": "x", "command": "y"}}}')

    with pytest.raises(UsageError, match=r"mine\.json: mcpServers\.git\.comand: unknown key"):
        Config.load(path, NOTHING)
    with pytest.raises(UsageError, match="no such file"):
        Config.load(tmp_path / "other.json", NOTHING)
    with pytest.raises(UsageError, match="cannot be read"):
        Config.load(tmp_path, NOTHING)


def test_references_expand_where_the_design_says_so(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("from-file\n")
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "key": "${KEY}",
                "mcpServers": {
                    "git": {
                        "command": "${BIN}/git-mcp",
                        "args": ["--token=${TOKEN}", "${EMPTY:-default}", "$${LITERAL}", "$PLAIN"],
                        "env": {"FILE": "${file:secret}", "CURSOR": "${env:TOKEN}"},
                        "cwd": "sub/${DIR:-dir}",
                    }
                },
            }
        )
    )
    environ = {"BIN": "/usr/bin", "TOKEN": "t0ken-value", "EMPTY": "", "KEY": "k" * 32}

    config = Config.load(tmp_path / "config.json", environ)

    git = config.servers["git"]
    assert git.command == "/usr/bin/git-mcp"
    assert git.args == ["--token=t0ken-value", "default", "${LITERAL}", "$PLAIN"]
    assert git.env == {"FILE": "from-file", "CURSOR": "t0ken-value"}
    assert git.cwd == str(tmp_path / "sub" / "dir")
    assert config.key == "k" * 32


def test_what_came_from_outside_is_known_as_secret() -> None:
    config = load(
        server(args=["${TOKEN}"], env={"PEM": "line-one-x\nline-two-y", "DEBUG": "1"}),
        {"TOKEN": "s3cret-token"},
    )
    quoted = load(server(args=["${TOKEN}"]), {"TOKEN": 'a"quoted\\one'})

    assert {"s3cret-token", "line-one-x", "line-two-y"} <= config.secrets
    assert {'a"quoted\\one', 'a\\"quoted\\\\one'} <= quoted.secrets  # in a line of JSON too
    assert "1" not in config.secrets  # it would be cut out of every line of the log
    assert "s3cret-token" not in str(config.secrets - {"s3cret-token"})


def test_a_secret_is_in_no_message_about_it() -> None:
    lines = errors(server(env={"TOKEN": ["s3cret-token"]}, args=[{"s3cret": 1}]))

    assert "s3cret" not in "".join(lines)


def test_the_command_line_wins_and_is_named() -> None:
    given = {**server(), "port": 1, "socket": "/run/a"}
    config = load(given, host="127.0.0.2", port=0)

    assert (config.host, config.port, config.socket) == ("127.0.0.2", 0, None)
    assert errors(server(), host="0.0.0.0")[0].startswith('--host: "0.0.0.0" can be reached')
    assert errors(server(), port=-1) == ["--port: must be greater than or equal to 0"]


def test_an_open_host_is_a_decision_that_has_to_be_written() -> None:
    config = load({**server(), "host": "0.0.0.0", "auth": {"type": "none", "unsafe": True}})

    assert config.host == "0.0.0.0"
    assert any("only loopback names are accepted as Host" in remark for remark in config.remarks)


def test_public_url_is_an_allowed_host() -> None:
    config = load({**server(), "public_url": "https://MCP.example.com:8443/gate/"})

    for host in ("mcp.example.com", "mcp.example.com:8443", "localhost:4000"):
        request = atrax.HttpRequest("GET", "/mcp", "", {"host": host}, b"", "")
        assert atrax.Identity(config).check(request) == atrax.ANONYMOUS


def test_isolation_without_auth_is_remarked() -> None:
    config = load(server(isolation="session"))

    assert any("one principal" in remark for remark in config.remarks)


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("2030-01-01", 1893456000),
        ("2030-01-01T00:00:00", 1893456000),
        ("2030-01-01T01:00:00+01:00", 1893456000),
        ("2029-12-31T23:59:59.5Z", 1893455999.5),
    ],
)
def test_a_time_without_a_zone_is_utc(written: str, seconds: float) -> None:
    config = load(tokens({**TOKEN, "expires": written}))

    assert config.auth.tokens[0].expires == seconds


def test_tokens_open_a_host_and_are_told_of_what_they_cannot_do() -> None:
    mine = {"name": "b", "token": "${B}", "servers": ["git"], "expires": "2020-01-01"}
    two = {
        "git": {"command": "a", "isolation": "principal"},
        "bare": {"command": "b", "prefix": ""},
    }
    config = load(
        {**tokens(mine, {**TOKEN, "tools": ["*"], "servers": ["git"]}), "mcpServers": two, "host": "0.0.0.0",
         "public_url": "https://a.example"},
        {"B": "the-secret-of-b-1"},
    )  # fmt: skip

    assert "the-secret-of-b-1" in config.secrets
    assert "the-secret-of-b-1" not in repr(config)
    assert [remark.partition(": ")[2] for remark in config.remarks] == [
        "auth.tokens[0].expires: has passed, so this token is refused",
        'auth.tokens[1].tools[0]: "*" allows nothing: "bare" is not among "servers"',
    ]


@pytest.mark.parametrize(
    ("glob", "owner"),
    [("a__*", "a"), ("a__b", "a"), ("a__b__c", "ab"), ("a__[bc]__*", "a"), ("a_*", "bare"), ("*", "bare")],
)  # fmt: skip
def test_a_glob_is_of_the_server_with_the_longest_prefix_before_its_wildcard(
    glob: str, owner: str
) -> None:
    names = {"a": "a", "ab": "a__b", "bare": ""}
    servers = {name: {"command": "x", "prefix": prefix} for name, prefix in names.items()}

    assert load({"mcpServers": servers}).server_of(glob) == owner


def test_a_bundled_server_runs_this_file() -> None:
    _, file, *rest = load(server(command="bundled:files", args=["."])).servers["git"].argv

    assert file == atrax.__file__
    assert rest == ["bundled", "files", "."]


ACCEPTED = [
    server(),
    {
        **server(),
        "auth": {
            "type": "oauth",
            "issuer": "https://a.example",
            "audience": "x",
            "jwks": "https://a.example/k",
            "grants": {"s": {"servers": ["git"]}},
        },
    },
    {"mcpServers": {"far": {"url": "https://example.com"}}},
    {"$schema": "x", "servers": {"a": {"type": "stdio", "command": "x", "envFile": "/dev/null"}}},
    server(tools=["*"], autoApprove=[], disabledTools=["x"], restart={"backoff": [1, 2]}),
    tokens(
        {**TOKEN, "servers": ["git"], "tools": ["git__*"], "expires": "2030-01-01", "admin": True}
    ),
    {**server(), "host": "::1", "limits": {"rate": None, "body": 5}, "log": {"format": "json"}},
]


@pytest.mark.parametrize("config", ACCEPTED)
def test_the_schema_accepts_what_the_reader_accepts(config: Any) -> None:
    load(config)
    jsonschema.Draft202012Validator(atrax.config_schema()).validate(config)


SHAPES = ["typo", "top typo", "nested typo", "field of ours", "wrong type", "port as text",
          "port range", "no bool", "null", "no command", "server is text", "no servers", "protocol",
          "offer", "no process", "zero timeout", "backoff shape", "unknown auth", "token typo", "sandbox",
          "short key"]  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_the_schema_refuses_wrong_shapes_too(name: str) -> None:
    validator = jsonschema.Draft202012Validator(atrax.config_schema())

    assert not validator.is_valid(MISTAKES[name][0])


def test_the_table_has_a_row_for_each_key() -> None:
    table = atrax.config_table()

    for row in (
        "| `limits.body` | 4 MiB |",
        "| `mcpServers.NAME.prefix` | NAME |",
        "| `port` | `4000` |",
    ):
        assert row in table
    for key in atrax.UNENFORCED:
        assert f"`{key.replace('*', 'NAME')}`" not in table


def test_the_config_of_this_repository_loads() -> None:
    config = Config.load(Path(__file__).parent.parent / "config.json", NOTHING)

    assert list(config.servers) == ["files", "notes"]
    assert config.remarks == []
