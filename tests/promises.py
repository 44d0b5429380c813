"""What Atrax promises: id, sentence, source. Each has a test that shows it; each such test names its promise.

    @promise("crash.isolated")
    async def test_a_child_that_dies_fails_only_its_own_calls(atrax): …

test_promises.py fails for a promise without a test and for a test of a promise that is not here."""

from __future__ import annotations

import dataclasses
from typing import Final

import pytest


@dataclasses.dataclass(frozen=True, slots=True)
class Promise:
    """One sentence that a user relies on, and where it was given."""

    sentence: str
    source: str


PROMISES: Final = {
    # One file
    "file.builds_from_locks": Promise(
        "A fresh clone, an empty HOME and one command give atrax.pyz, from packages locked by hash.",
        "issue 4; DESIGN, One file",
    ),
    "file.runs_without_network": Promise(
        "Once built, atrax.pyz runs, and is built again, without a network.", "issue 4"
    ),
    "file.same_bytes": Promise("The same inputs give the same bytes.", "DESIGN, One file"),
    "file.from_memory": Promise(
        "Native modules load from memory; nothing is written, no HOME and no writable directory is needed.",
        "DESIGN, One file",
    ),
    "file.from_cache": Promise(
        "Without memfd they load from a cache keyed by content; one that others can write is not used.",
        "DESIGN, One file",
    ),
    "file.other_python": Promise(
        "Another Python than the one it was built for is told so in one line.", "issue 4, item 9"
    ),
    "file.alone": Promise(
        "What the machine has installed is never imported in place of what lies in the file.",
        "DESIGN, One file",
    ),
    "file.clear_errors": Promise(
        "No pip, no network, a wrong hash: the build says which and what to do, without a traceback.",
        "DESIGN, Commands",
    ),
    # Who may what
    "scopes.one_view": Promise(
        "What a list shows is exactly what a call may reach, on /mcp and on each server's endpoint, for "
        "tools, prompts, resources, templates, completion, subscriptions, tasks and status.",
        "issue 6; DESIGN, Who may what",
    ),
    "scopes.unknown": Promise(
        "What a principal may not use is unknown to it: no error, wait or text tells that it exists.",
        "DESIGN, Who may what",
    ),
    "scopes.session": Promise(
        "A request with fewer rights than its session or parked call began with finds neither.",
        "DESIGN, Who may what",
    ),
    "scopes.list_changed": Promise(
        "list_changed reaches those alone whose own list has changed.", "DESIGN, Lists"
    ),
    # Serving
    "serve.screen": Promise(
        "The start-up screen shows the URL, each server with its state and tools, and how to connect.",
        "issue 4",
    ),
    "serve.probes": Promise(
        "/health and /ready are for every probe; what is not ready is named to who may see /status.",
        "DESIGN, HTTP",
    ),
    "start.waits": Promise(
        "A call to a server that is still starting waits for it; a list does not wait for a slow one.",
        "issue 4, item 2; DESIGN, Lists",
    ),
    "stop.everything": Promise(
        "Ctrl-C stops everything, children and grandchildren too, in order and without a traceback.",
        "issue 4",
    ),
    "stop.drains": Promise("At SIGTERM calls in flight have `drain` seconds.", "DESIGN, Config"),
    "stop.killed": Promise(
        "If Atrax itself is killed, its children die at once.", "DESIGN, Safe by default"
    ),
    # Clients and servers
    "clients.one_url": Promise("Clients of both eras use one URL.", "DESIGN, The promise"),
    "clients.real": Promise(
        "Real clients not ours list, call, read and get an error right, on both endpoints.",
        "issue 4",
    ),
    "servers.real": Promise("Real servers not ours run side by side in one config.", "issue 4"),
    "servers.side_by_side": Promise(
        "A slow or broken server never delays or breaks the others.", "issue 4, item 2"
    ),
    "servers.what_is_wrong": Promise(
        "/status and the screen say in one line what is wrong with each server.", "issue 4"
    ),
    "cells.conformance": Promise(
        "The official conformance suite passes in all four cells, on both endpoints.",
        "DESIGN, The promise",
    ),
    "cells.asks": Promise(
        "Elicitation, sampling and roots arrive whole, once and at the right client, in all four cells.",
        "DESIGN, The promise",
    ),
    "cells.apps": Promise(
        "MCP Apps (`ui://`) are read, listed or not.", "PROTOCOL, Joining, extensions"
    ),
    "cells.tasks": Promise(
        "Tasks pass on both endpoints; a tool that must be one works for clients without tasks.",
        "PROTOCOL, Joining, tasks",
    ),
    "asks.attributed": Promise(
        "An ask reaches the client of its own call, or is refused; never another's.",
        "DESIGN, Whose ask is it?",
    ),
    "isolation.children": Promise(
        "With `isolation` children are started per session or principal, bounded, reused, and end with it.",
        "DESIGN, Config, isolation",
    ),
    "roots.never_widen": Promise(
        "A client's roots never widen what a shared server may touch.",
        "PROTOCOL, South, Roots widen",
    ),
    "ids.never_cross": Promise(
        "Each client's ids are its own: no answer is misdelivered.", "DESIGN, Ids"
    ),
    "lists.complete": Promise(
        "Every item of every server is listed once, with pages followed on both sides.", "issue 4"
    ),
    "lists.equal_names": Promise(
        "Of names that become equal the first in config order is kept.", "DESIGN, Lists"
    ),
    # Who may do what
    "auth.token": Promise(
        "With tokens everything but /health and /ready needs one, in the Authorization header alone.",
        "DESIGN, HTTP; RFC 6750",
    ),
    "auth.hashes": Promise(
        "`atrax token` prints a token once; the config needs no more than its hash.",
        "DESIGN, Commands",
    ),
    "auth.expiry": Promise(
        "A token is refused from the moment it expires.", "DESIGN, Config, auth"
    ),
    "auth.one_answer": Promise(
        "A refusal does not tell one wrong token from another.", "DESIGN, Safe by default"
    ),
    "auth.slowed": Promise(
        "After 10 wrong tokens in a minute an address gets 429 with Retry-After; a right one still passes.",
        "DESIGN, Safe by default",
    ),
    "auth.browsers": Promise(
        "A page at an allowed origin can read a refusal, and its preflight needs no token.",
        "issue 6; Fetch, CORS-preflight fetch",
    ),
    "auth.events": Promise(
        "A refused token, Host or Origin is an event with a name of its own, counted always, told a few times a minute.",
        "issue 6, Seen",
    ),
    "oauth.tokens": Promise(
        "A JWT of the issuer for this audience, signed with an algorithm of the list, lets its subject in.",
        "DESIGN, Config, auth; RFC 9068",
    ),
    "oauth.refused": Promise(
        "Any other token is refused, whatever its header asks for, and all with one answer.",
        "issue 6; RFC 8725",
    ),
    "oauth.rotation": Promise(
        "A new key of the issuer is fetched while the request waits, at most every 10 s.",
        "DESIGN, Safe by default",
    ),
    "oauth.keys_missing": Promise(
        "While the issuer's keys cannot be had the answer is 503 with Retry-After, and the log says why.",
        "issue 6",
    ),
    "oauth.air_gapped": Promise("The issuer's keys may come from a file.", "DESIGN, Config, auth"),
    "oauth.metadata": Promise(
        "Each endpoint has its protected resource metadata, and a refusal leads there.",
        "DESIGN, HTTP; RFC 9728",
    ),
    "oauth.step_up": Promise(
        "Where a scope would help, the answer is 403 insufficient_scope and names it.",
        "DESIGN, Who may what; MCP 2026-07-28, Authorization",
    ),
    # What breaks
    "crash.isolated": Promise(
        "A child that dies fails only its own calls (1000); its server comes back.",
        "issue 4; DESIGN, A child that dies",
    ),
    "crash.repeated": Promise(
        "What is safe to repeat and has shown nothing yet is repeated once on the successor.",
        "DESIGN, A child that dies",
    ),
    "crash.circuit": Promise(
        "A server that keeps dying is started less and less often, then given up for a while, visibly.",
        "DESIGN, Config, restart",
    ),
    "resume.post_stream": Promise(
        "A legacy client whose stream broke in a call fetches what is left with Last-Event-ID, it alone, once.",
        "PROTOCOL, North, resumption",
    ),
    "cancel.closing": Promise(
        "Closing the response cancels a modern client's call at the child, and no legacy client's.",
        "PROTOCOL, North, the client closes the response",
    ),
    # HTTP
    "http.fuzzed": Promise(
        "No request is accepted that h11 refuses or reads otherwise, or that RFC 9112 lets be read in two ways.",
        "issue 6, To show",
    ),
    "http.smuggled": Promise(
        "After each hostile request the gateway still serves, and no child has seen what was hidden in it.",
        "issue 6, To show",
    ),
    "secrets.nowhere": Promise(
        "No log, status, metric, error, audit line or command shows a secret, wherever it stands.",
        "issue 6, To show",
    ),
    # JSON and schemas
    "json.refused": Promise(
        "What is no JSON, too deep or ambiguous is refused and never forwarded.",
        "issue 4; PROTOCOL, JSON",
    ),
    "json.exact": Promise(
        "An integer arrives as it was sent; one beyond 64 bits is an error, not another number.",
        "DESIGN, Everything travels",
    ),
    "json.one_reading": Promise(
        "Nothing can pass a check in one reading and reach the child in another.",
        "DESIGN, Everything travels",
    ),
    "json.child_lies": Promise(
        "What a child writes can fail the call it answers, and no other.", "PROTOCOL, JSON"
    ),
    "schema.never_fetched": Promise(
        "A `$ref` is never fetched; a tool that needs one is hidden, and /status says why.",
        "DESIGN, Calls",
    ),
    "schema.never_stalls": Promise(
        "No schema and no argument, however made, holds up other clients.", "DESIGN, Calls"
    ),
    # Paths
    "child.bounded": Promise(
        "Whatever a server writes, how much and how fast: memory, log and its neighbours' calls do not suffer.",
        "issue 6, item 4",
    ),
    "container.hardened": Promise(
        "With `container` the engine is told each lock, and only what the config asks for is left out.",
        "issue 6, item 4; DESIGN, Config",
    ),
    "container.secrets": Promise(
        "No secret is on an engine's command line, and none of its settings goes into the container.",
        "issue 6, item 4",
    ),
    "container.removed": Promise(
        "A container ends with its server: at a stop, at a crash, and when the engine's client dies.",
        "issue 6, item 4",
    ),
    "container.told": Promise(
        "What an engine refuses is told with what to do; nothing is pulled.", "issue 6, item 4"
    ),
    "container.holds": Promise(
        "In a real container writing, connecting, forking and filling memory are stopped.",
        "issue 6, item 4",
    ),
    "paths.inside": Promise(
        "With `paths` no spelling of a path leaves the directories; odd but honest names pass.",
        "DESIGN, Paths; issue 6, item 3",
    ),
    # Everything travels, in every cell
    "travels.list_changed": Promise(
        "A changed list is announced to who sees it, and only to them.", "DESIGN, Lists"
    ),
    "travels.links": Promise(
        "Links and URIs in results are passed on and never followed.", "issue 6, 3"
    ),
    "travels.progress": Promise(
        "Progress comes under the request's own token.", "DESIGN, Everything travels"
    ),
    "travels.logging": Promise(
        "Log messages come from the level that the client wants.", "DESIGN, Everything travels"
    ),
    "travels.cancellation": Promise(
        "A cancelled call ends at the child, and only that call.", "DESIGN, Everything travels"
    ),
    "travels.completion": Promise(
        "Completion is answered by the server of the reference.", "DESIGN, Everything travels"
    ),
    "travels.subscriptions": Promise(
        "Who subscribed to a resource hears of its changes, until it unsubscribes.",
        "DESIGN, Everything travels",
    ),
    "travels.meta": Promise(
        "Trace context, other `_meta` and unknown members pass untouched, both ways.",
        "DESIGN, Everything travels",
    ),
    # Who comes, and how
    "tls.https": Promise(
        "With `tls` Atrax speaks HTTPS, TLS 1.2 or newer, and nothing in clear.",
        "DESIGN, Config, tls",
    ),
    "tls.certificates": Promise(
        "With `client_ca` nobody comes without a certificate of it, whose subject is the principal.",
        "DESIGN, Config, tls",
    ),
    "proxies.trusted": Promise(
        "X-Forwarded-* counts from `trusted_proxies` alone, and no client can forge its address.",
        "DESIGN, Config, trusted_proxies; issue 6",
    ),
    # What is seen
    "audit.each_call": Promise(
        "Each call leaves one line that says who, from where, what, and how it ended, refused ones too.",
        "DESIGN, Audit",
    ),
    "audit.rounds": Promise(
        "Rounds of one call count once; the first line is there even if its client never comes back.",
        "DESIGN, Parking",
    ),
    "audit.rotated": Promise(
        "At SIGHUP the audit goes on in the file of that name.", "DESIGN, Audit"
    ),
    "audit.stops_nobody": Promise(
        "A full disk or a vanished directory is reported, and stops nobody.", "DESIGN, Audit"
    ),
    "audit.redacted": Promise("No secret stands in the audit.", "DESIGN, Safe by default"),
    "events.stable": Promise(
        "Security events have stable names, are counted from 0 on, and cannot fill the log.",
        "issue 6, item 6; SECURITY",
    ),
    "reload.takes_over": Promise(
        "SIGHUP takes over tokens; a wrong config changes nothing; what needs a restart is named.",
        "DESIGN, Commands; issue 6, item 2",
    ),
    "reload.ends": Promise(
        "What belongs to a token that is gone or may do less ends at the reload, and nothing else.",
        "DESIGN, Who may what",
    ),
    "reload.secrets": Promise(
        "Secrets of a reloaded config are redacted too.", "DESIGN, Safe by default"
    ),
    "expiry.ends": Promise(
        "Streams, sessions and parked calls end when their token expires; a newer one prolongs a session.",
        "DESIGN, Who may what",
    ),
    "owners.unseen": Promise(
        "Another principal's session, stream, parked call or task is as if it did not exist, for every verb.",
        "issue 6, item 2; DESIGN, Who may what",
    ),
    "limits.per_principal": Promise(
        "Rates and calls in flight are counted by principal; past them 429 with Retry-After, in both eras.",
        "DESIGN, HTTP; issue 6, item 2",
    ),
    "request.id": Promise(
        "Each request has an id, which its answer and its events carry.", "issue 6, item 6"
    ),
    "deploy.nginx": Promise(
        "SECURITY's recipe for nginx with TLS works as it stands: events at once, asks, resumption, "
        "client address.",
        "issue 6; SECURITY, Deploy it",
    ),
    "deploy.systemd": Promise(
        "systemd understands SECURITY's unit and finds it hardened.", "issue 6; SECURITY, Deploy it"
    ),
    "deploy.docker": Promise(
        "docker or podman knows each option of SECURITY's line.", "issue 6; SECURITY, Deploy it"
    ),
    # The sandbox
    "sandbox.files": Promise(
        "A sandboxed child reads and changes nothing outside of `read` and `write`, modes and times included.",
        "issue 6, item 4; DESIGN, Config, sandbox",
    ),
    "sandbox.honest": Promise(
        "Honest work inside its directories goes on, of bundled, Python and Node servers.",
        "issue 6, item 4",
    ),
    "sandbox.network": Promise(
        "Without `network` a sandboxed child reaches no socket by TCP, UDP or a Unix socket; with it no Unix socket.",
        "issue 6, item 4",
    ),
    "sandbox.others": Promise(
        "A sandboxed child can neither look into, nor end, nor slow down Atrax or a sibling; ptrace, kill and the like are events.",
        "issue 6, item 4",
    ),
    "sandbox.limits": Promise(
        "Memory, processes and files of a sandboxed child are limited; being at a limit is an event.",
        "issue 6, item 4",
    ),
    "sandbox.killed": Promise(
        "A child that the kernel killed for what it tried is the event `sandbox.killed`.",
        "issue 6, item 6",
    ),
    "sandbox.ends": Promise(
        "Descendants of a sandboxed child end with it and with Atrax.", "DESIGN, Safe by default"
    ),
    "sandbox.before": Promise(
        "What a child wrote cannot act before its successor is bound, nor widen what that may do.",
        "issue 6, item 4",
    ),
    "sandbox.refused": Promise(
        "Where the kernel cannot do what a sandbox asks, that server fails with what is missing and the others run.",
        "DESIGN, Config, sandbox",
    ),
    "sandbox.told": Promise("`check` says what each child may do.", "issue 6, item 4"),
    # Tools that lie
    "pin.hides": Promise(
        "With `pin`, a tool whose definition is new or changed in any member is hidden until it is approved.",
        "issue 6, item 5; DESIGN, Pinning",
    ),
    "pin.seen": Promise(
        "What a pin hides is logged once, counted, and shown in /status as a diff.",
        "DESIGN, Pinning",
    ),
    "pin.error": Promise(
        "A call of a tool that a pin hides gets 1012 from who may otherwise use it; to others it is unknown.",
        "DESIGN, HTTP",
    ),
    "pin.approval": Promise(
        "`pin` and SIGHUP, or an admin's POST with the digests that were seen, approve; list_changed follows.",
        "DESIGN, Pinning; HTTP",
    ),
    "pin.operators": Promise(
        "POST /servers/NAME/pin needs `admin`, or without auth a client on this machine and no proxy.",
        "DESIGN, HTTP",
    ),
    "pin.lock": Promise(
        "The lock is replaced at once or not at all, gives the same bytes for the same tools, and is never half believed.",
        "issue 6, item 5",
    ),
    "pin.name": Promise(
        "The name of an approved tool that changed goes to no other server.", "DESIGN, Pinning"
    ),
    "clean.cuts": Promise(
        "With `clean`, hidden text is cut from definitions and instructions, and nothing that can be seen is.",
        "issue 6, item 5",
    ),
    "clean.warns": Promise(
        "Hidden text is warned of by `check`, the start-up screen and an event, with tool, member and kind.",
        "issue 6, item 5",
    ),
    "clean.names": Promise(
        "Where a name holds hidden text, `clean` hides its item.", "README, Pin what you approved"
    ),
    "clean.bounded": Promise(
        "No definition holds the loop, however large it is or however much it hides.",
        "issue 6, item 5",
    ),
    "names.lookalike": Promise(
        "A tool that takes another server's name, or looks like one of its tools, is warned of.",
        "issue 6, item 5",
    ),
    # The documents
    "docs.keys": Promise(
        "README's table of keys is the one that the code declares.", "STYLE, Tests; README"
    ),
    "docs.commands": Promise(
        "Every command is in README, and every one there exists.", "STYLE, Tests"
    ),
    "docs.tests": Promise("Every test that SECURITY names exists.", "SECURITY"),
    # The house
    "house.sections": Promise(
        "A section of atrax.py names only what stands above it.", "STYLE, table of contents"
    ),
    "house.one_list_of_packages": Promise(
        "The packages in the head of atrax.py are those of the lock.", "issue 4, item 10"
    ),
}


def promise(*ids: str) -> pytest.MarkDecorator:
    """Marks a test as one that shows these promises. (test_promises.py reads it in the source.)"""
    return pytest.mark.promise(*ids)
