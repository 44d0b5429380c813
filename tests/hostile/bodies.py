"""Bodies whose length could be read in two ways, and the requests hidden in them."""

from __future__ import annotations

from hostile.row import CHUNKED, SMUGGLED, Row, get, post

LENGTH = "RFC 9112, 6.3"
CODING = "RFC 9112, 6.1"
CHUNK = "RFC 9112, 7.1"
TRAILER = "RFC 9112, 7.1.2"
HIDDEN = b"0\r\n\r\n" + SMUGGLED


def length(value: bytes, body: bytes = b"hello") -> bytes:
    return post(b"Content-Length: " + value, body=body)


def coding(value: bytes, body: bytes = b"5\r\nhello\r\n0\r\n\r\n") -> bytes:
    return post(b"Transfer-Encoding: " + value, body=body)


def chunks(body: bytes) -> bytes:
    return post(CHUNKED, body=body)


# One row a line, where it fits.
# fmt: off
ROWS = [
    # ---- Content-Length ----
    Row("length", length(b"5"), (200,), LENGTH),
    Row("length-then-more", length(b"5") + get(b"Host: a"), (200, 200), "RFC 9112, 9.3.2"),
    Row("length-zero", length(b"0", b""), (200,), LENGTH),
    Row("length-none", post(), (200,), LENGTH),
    Row("length-none-but-a-type", post(b"Content-Type: application/json", body=b"{}"), (411,),
        "RFC 9110, 15.5.12"),
    Row("length-on-get", get(b"Host: a", b"Content-Length: %d" % len(SMUGGLED)) + SMUGGLED, (200,),
        "RFC 9110, 9.3.1: read, not run"),
    Row("length-plus", length(b"+5"), (400,), LENGTH),
    Row("length-minus", length(b"-5"), (400,), LENGTH),
    Row("length-minus-zero", length(b"-0"), (400,), LENGTH),
    Row("length-hex", length(b"0x5"), (400,), LENGTH),
    Row("length-underscore", length(b"1_0", b"helloworld"), (400,), "CVE-2018-1000164 and kin"),
    Row("length-leading-zero", length(b"05"), (400,), "octal to some (RFC allows it)"),
    Row("length-float", length(b"5.0"), (400,), LENGTH),
    Row("length-exponent", length(b"5e0"), (400,), LENGTH),
    Row("length-space-inside", length(b"1 0", b"helloworld"), (400,), LENGTH),
    Row("length-list", length(b"5, 5"), (400,), "RFC 9110, 8.6"),
    Row("length-list-differs", length(b"5, 0"), (400,), "RFC 9110, 8.6"),
    Row("length-empty", length(b"", b""), (400,), LENGTH),
    Row("length-comma", length(b",", b""), (400,), LENGTH),
    Row("length-word", length(b"five"), (400,), LENGTH),
    Row("length-superscript", length(b"\xb2", b"he"), (400,), "str.isdigit() is true"),
    Row("length-arabic", length("٥".encode()), (400,), "int() takes it"),
    Row("length-nbsp", length(b"\xa05"), (400,), "str.strip() takes it"),
    Row("length-next-line", length(b"5\x85"), (400,), "str.strip() takes it"),
    Row("length-quoted", length(b'"5"'), (400,), LENGTH),
    Row("length-twice-equal", post(b"Content-Length: 5", b"Content-Length: 5", body=b"hello"), (400,),
        "RFC 9112, 6.3"),
    Row("length-twice", post(b"Content-Length: 5", b"Content-Length: 41", body=b"hello" + SMUGGLED),
        (400,), "RFC 9112, 11.2"),
    Row("length-twice-other-case", post(b"Content-Length: 5", b"content-length: 0", body=b"hello"),
        (400,), "RFC 9112, 6.3"),
    Row("length-64-bits-and-one", length(b"18446744073709551617"), (413,), "CWE-190"),
    Row("length-million-digits", length(b"9" * 30000), (413,), "CVE-2020-10735"),
    Row("length-too-large", length(b"4194305", b""), (413,), "RFC 9110, 15.5.14: not read first"),
    Row("length-too-large-expected", post(b"Content-Length: 4194305", b"Expect: 100-continue"), (413,),
        "RFC 9110, 10.1.1"),
    # ---- Transfer-Encoding ----
    Row("coding", coding(b"chunked"), (200,), CODING),
    Row("coding-and-length", post(CHUNKED, b"Content-Length: 5", body=HIDDEN), (400,), "TE.CL"),
    Row("length-and-coding", post(b"Content-Length: 41", CHUNKED, body=HIDDEN), (400,), "CL.TE"),
    Row("coding-and-length-0", post(CHUNKED, b"Content-Length: 0", body=HIDDEN), (400,), "TE.0"),
    Row("coding-twice", post(CHUNKED, CHUNKED, body=HIDDEN), (400,), CODING),
    Row("coding-twice-differs", post(CHUNKED, b"Transfer-Encoding: identity", body=HIDDEN), (400,),
        "TE.TE"),
    Row("coding-other-case", coding(b"CHUNKED"), (400,), "a proxy may compare bytes"),
    Row("coding-x", coding(b"xchunked"), (400,), "TE.TE"),
    Row("coding-identity", coding(b"identity"), (400,), CODING),
    Row("coding-gzip", coding(b"gzip, chunked"), (400,), CODING),
    Row("coding-not-last", coding(b"chunked, identity"), (400,), "RFC 9112, 6.3"),
    Row("coding-chunked-twice", coding(b"chunked, chunked"), (400,), CODING),
    Row("coding-comma", coding(b"chunked,"), (400,), "TE.TE"),
    Row("coding-leading-comma", coding(b",chunked"), (400,), "TE.TE"),
    Row("coding-parameter", coding(b"chunked;a=b"), (400,), CODING),
    Row("coding-quoted", coding(b'"chunked"'), (400,), "TE.TE"),
    Row("coding-empty", coding(b""), (400,), CODING),
    Row("coding-vertical-tab", coding(b"\x0bchunked"), (400,), "TE.TE"),
    Row("coding-next-line", coding(b"\x85chunked"), (400,), "str.strip() takes it"),
    Row("coding-nbsp", coding(b"chunked\xa0"), (400,), "str.strip() takes it"),
    Row("coding-tab", post(b"Transfer-Encoding:\tchunked", body=HIDDEN[:5]), (200,), "RFC 9110, 5.5"),
    Row("coding-space-before-colon", post(b"Transfer-Encoding : chunked", body=HIDDEN), (400,), "TE.TE"),
    Row("coding-folded", post(b"Transfer-Encoding:", b" chunked", body=HIDDEN), (400,), "TE.TE"),
    Row("coding-bare-lf", post(b"X: y\nTransfer-Encoding: chunked", body=HIDDEN), (400,), "TE.TE"),
    Row("coding-bare-cr", post(b"X: y\rTransfer-Encoding: chunked", body=HIDDEN), (400,), "TE.TE"),
    Row("coding-underscore", post(b"Transfer_Encoding: chunked", b"Content-Length: 0"), (200,),
        "another name, without meaning"),
    Row("coding-in-1.0", b"POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + HIDDEN,
        (400,), "RFC 9112, 6.1"),
    # ---- chunks ----
    Row("chunk", chunks(b"5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n"), (200,), CHUNK),
    Row("chunk-then-more", chunks(b"5\r\nhello\r\n0\r\n\r\n") + get(b"Host: a"), (200, 200), CHUNK),
    Row("chunk-upper-hex", chunks(b"A\r\nhelloworld\r\n0\r\n\r\n"), (200,), CHUNK),
    Row("chunk-leading-zeros", chunks(b"0005\r\nhello\r\n000\r\n\r\n"), (200,), CHUNK),
    Row("chunk-extension", chunks(b'5;a=b;c="d e"\r\nhello\r\n0;x\r\n\r\n'), (200,), "RFC 9112, 7.1.1"),
    Row("chunk-extension-lf", chunks(b"5;a\nhello\r\n0\r\n\r\n"), (400,), "TERM.EXT, 2025"),
    Row("chunk-extension-cr", chunks(b"5;a\rb\r\nhello\r\n0\r\n\r\n"), (400,), "EXT.TERM, 2025"),
    Row("chunk-extension-nul", chunks(b"5;a\x00\r\nhello\r\n0\r\n\r\n"), (400,), "RFC 9112, 7.1.1"),
    Row("chunk-extension-spaces", chunks(b"5 ;a\r\nhello\r\n0\r\n\r\n"), (400,), "BWS: nobody sends it"),
    Row("chunk-extension-open-quote", chunks(b'5;a="b\r\nhello\r\n0\r\n\r\n'), (400,), "RFC 9112, 7.1.1"),
    Row("chunk-extension-empty", chunks(b"5;\r\nhello\r\n0\r\n\r\n"), (400,), "RFC 9112, 7.1.1"),
    Row("chunk-extension-long", chunks(b"5;" + b"a" * 300 + b"\r\nhello\r\n0\r\n\r\n"), (400,),
        "CVE-2023-39326"),
    Row("chunk-extension-endless", chunks(b"5;" + b"a" * 5000), (400,), "CVE-2024-24557 and kin"),
    Row("chunk-extensions-many", chunks((b"1;" + b"a" * 200 + b"\r\nx\r\n") * 200 + b"0\r\n\r\n"),
        (400,), "CVE-2023-39326"),
    Row("chunk-size-empty", chunks(b"\r\nhello\r\n0\r\n\r\n"), (400,), CHUNK),
    Row("chunk-size-plus", chunks(b"+5\r\nhello\r\n0\r\n\r\n"), (400,), CHUNK),
    Row("chunk-size-minus", chunks(b"-5\r\nhello\r\n0\r\n\r\n"), (400,), CHUNK),
    Row("chunk-size-0x", chunks(b"0x5\r\nhello\r\n0\r\n\r\n"), (400,), "CVE-2022-24801 and kin"),
    Row("chunk-size-underscore", chunks(b"1_0\r\nhello\r\n0\r\n\r\n"), (400,), "int(…, 16) takes it"),
    Row("chunk-size-word", chunks(b"five\r\nhello\r\n0\r\n\r\n"), (400,), CHUNK),
    Row("chunk-size-space", chunks(b"5 \r\nhello\r\n0\r\n\r\n"), (400,), CHUNK),
    Row("chunk-size-leading-space", chunks(b" 5\r\nhello\r\n0\r\n\r\n"), (400,), CHUNK),
    Row("chunk-size-tab", chunks(b"5\t\r\nhello\r\n0\r\n\r\n"), (400,), CHUNK),
    Row("chunk-size-arabic", chunks("٥\r\nhello\r\n0\r\n\r\n".encode()), (400,), "int(…, 16) takes it"),
    Row("chunk-size-64-bits", chunks(b"FFFFFFFFFFFFFFFF\r\nhello"), (413,), "CVE-2013-2028"),
    Row("chunk-size-overflow", chunks(b"10000000000000005\r\nhello\r\n0\r\n\r\n"), (400,),
        "CWE-190: 5 to who keeps 64 bits"),
    Row("chunk-size-long", chunks(b"0" * 300 + b"5\r\nhello\r\n0\r\n\r\n"), (400,), CHUNK),
    Row("chunk-size-endless", chunks(b"0" * 5000), (400,), CHUNK),
    Row("chunk-size-lf", chunks(b"5\nhello\r\n0\r\n\r\n"), (400,), "CVE-2025-22871"),
    Row("chunk-size-cr", chunks(b"5\rhello\r\n0\r\n\r\n"), (400,), CHUNK),
    Row("chunk-size-cr-cr-lf", chunks(b"5\r\r\nhello\r\n0\r\n\r\n"), (400,), CHUNK),
    Row("chunk-shorter", chunks(b"6\r\nhello\r\n0\r\n\r\n" + SMUGGLED), (400,), CHUNK),
    Row("chunk-longer", chunks(b"4\r\nhello\r\n0\r\n\r\n"), (400,), "CVE-2025-43859"),
    Row("chunk-ends-otherwise", chunks(b"5\r\nhelloXX0\r\n\r\n" + SMUGGLED), (400,), "CVE-2025-43859"),
    Row("chunk-ends-lf", chunks(b"5\r\nhello\n0\r\n\r\n"), (400,), CHUNK),
    Row("chunk-no-end", chunks(b"5\r\nhello0\r\n\r\n"), (400,), CHUNK),
    Row("chunk-too-large", chunks(b"400001\r\n"), (413,), "RFC 9110, 15.5.14: not read first"),
    Row("chunks-too-large", chunks(b"200000\r\n" + b"a" * 0x200000 + b"\r\n200001\r\n"), (413,),
        "RFC 9110, 15.5.14"),
    # ---- trailers ----
    Row("trailer", chunks(b"5\r\nhello\r\n0\r\nX: y\r\n\r\n"), (200,), TRAILER),
    Row("trailer-dropped", chunks(b"0\r\nX-Forwarded-For: ::1\r\nMcp-Name: b\r\n\r\n") + get(b"Host: a"),
        (200, 200), "RFC 9110, 6.5.1"),
    Row("trailer-length", chunks(b"0\r\nContent-Length: 5\r\n\r\n") + SMUGGLED, (400,), "RFC 9110, 6.5.1"),
    Row("trailer-coding", chunks(b"0\r\nTransfer-Encoding: x\r\n\r\n") + SMUGGLED, (400,), "fuzz_http"),
    Row("trailer-host", chunks(b"0\r\nHost: b\r\n\r\n"), (400,), "RFC 9110, 6.5.1"),
    Row("trailer-authorization", chunks(b"0\r\nAuthorization: Bearer x\r\n\r\n"), (400,), "RFC 9110, 6.5.1"),
    Row("trailer-lf", chunks(b"0\r\nX: y\n\r\n"), (400,), "RFC 9112, 2.2"),
    Row("trailer-all-lf", chunks(b"0\r\n\n" + SMUGGLED), (400,), "RFC 9112, 2.2"),
    Row("trailer-no-colon", chunks(b"0\r\nGET / HTTP/1.1\r\n\r\n"), (400,), TRAILER),
    Row("trailer-folded", chunks(b"0\r\nX: y\r\n z\r\n\r\n"), (400,), "RFC 9112, 5.2"),
    Row("trailer-space-before-colon", chunks(b"0\r\nX : y\r\n\r\n"), (400,), "RFC 9112, 5.1"),
    Row("trailer-nul", chunks(b"0\r\nX: \x00\r\n\r\n"), (400,), "RFC 9110, 5.5"),
    Row("trailer-hundred", chunks(b"0\r\n" + b"X: y\r\n" * 100 + b"\r\n"), (200,), TRAILER),
    Row("trailer-too-many", chunks(b"0\r\n" + b"X: y\r\n" * 101 + b"\r\n"), (431,), "RFC 6585, 5"),
    Row("trailer-endless", chunks(b"0\r\nX: " + b"y" * 70000), (431,), "RFC 6585, 5"),
    # ---- the second request is wrong, the first is answered ----
    Row("wrong-second", get(b"Host: a") + b"G(T / HTTP/1.1\r\n\r\n", (200, 400), "RFC 9112, 9.3.2"),
    Row("body-too-long", length(b"5", b"hello!") + SMUGGLED, (200, 501), LENGTH),
    Row("chunks-then-junk", chunks(b"0\r\n\r\nX\r\n\r\n" + SMUGGLED), (200, 400), CHUNK),
]
