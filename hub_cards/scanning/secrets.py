"""What a secret looks like: the table of token formats. `hub_cards.detect` reads it.

The formats are facts published by the providers: their documentation, GitHub's list of supported secrets, the
rules of gitleaks and detect-secrets. Lengths are lower bounds on purpose: providers lengthen their tokens more often
than they shorten them, and a cut token is still worth a look.
"""

import re
from typing import NamedTuple

ALNUM, WORD, DOTTED, BASE64, HEX = "[A-Za-z0-9]", "[A-Za-z0-9_-]", "[A-Za-z0-9_.=-]", "[A-Za-z0-9+/_=-]", "[0-9a-fA-F]"


class Token(NamedTuple):
    """One format: any of `prefixes` (separated by spaces), then at least `least` characters of the class `body`.

    Example:
        >>> next(token for token in TOKENS if "hf_" in token.prefixes).kind
        'Hugging Face token'
    """

    kind: str
    prefixes: str
    body: str = WORD
    least: int = 16


class Shape(NamedTuple):
    """One format without a fixed prefix: `pattern`, looked for around each of `needles`.

    Group 1, where the pattern has one, is the secret; the rest is what gives it away.

    Example:
        >>> bool(next(shape for shape in SHAPES if shape.kind == "netrc login").pattern.search("machine learning"))
        False
    """

    kind: str
    needles: tuple[str, ...]
    pattern: re.Pattern[str]


def tails(*words: str) -> tuple[str, ...]:
    """Returns each of `words` without its first letter, in lower and in upper case: `oken` is in `Token` too.

    Example:
        >>> tails("token")
        ('oken', 'OKEN')
    """
    return tuple(case(word[1:]) for word in words for case in (str.lower, str.upper))


TOKENS = (
    # Model hubs and providers of language models: their API documentation.
    Token("Hugging Face token", "hf_ api_org_ hf_oauth_ hf_jwt_"),
    Token("OpenAI key", "sk- sk-proj- sk-svcacct- sk-admin- sk-None- sess-"),
    Token("Anthropic key", "sk-ant-"),
    Token("OpenRouter key", "sk-or-"),
    Token("Langfuse key", "sk-lf-"),
    Token("Cerebras key", "csk-"),
    Token("Groq key", "gsk_"),
    Token("Perplexity key", "pplx-"),
    Token("xAI key", "xai-"),
    Token("Replicate token", "r8_"),
    Token("Fireworks key", "fw_"),
    Token("Together key", "tgp_v1_"),
    Token("NVIDIA key", "nvapi-"),
    Token("LangSmith key", "lsv2_ ls__"),
    Token("Pinecone key", "pcsk_"),
    Token("LlamaCloud key", "llx-"),
    Token("Jina key", "jina_"),
    Token("Voyage key", "al- pa-", WORD, 30),
    Token("Tavily key", "tvly-"),
    Token("Firecrawl key", "fc-", HEX, 28),
    Token("RunPod key", "rpa_"),
    Token("Anyscale key", "esecret_ aph0_"),
    Token("ElevenLabs key", "sk_", HEX, 40),
    # Experiment trackers: W&B's new keys carry a version, the old ones are 40 hex digits (SHAPES).
    Token("Weights & Biases key", "wandb_v1_"),
    Token("Kaggle token", "KGAT_"),
    Token("Neptune token", "eyJhcGlfYWRkcmVzcyI6", BASE64),  # base64 of {"api_address":
    # Code hosts: github.blog 2021-04-05, docs.gitlab.com "Token prefixes", Bitbucket and Atlassian documentation.
    Token("GitHub token", "ghp_ gho_ ghu_ ghs_ ghr_ github_pat_"),
    Token(
        "GitLab token",
        "glpat- gldt- glrt- glrtr- glcbt- glptt- glft- "
        "glimt- glagent- gloas- glsoat- glffct- glwt- GR1348941 _gitlab_session=",
        DOTTED,
    ),
    Token("Bitbucket token", "ATBB ATCTT3", DOTTED, 24),
    Token("Atlassian token", "ATATT3 ATSTT3 ATTA", DOTTED, 24),
    Token("Sourcegraph token", "sgp_"),
    Token("CircleCI token", "CCIPAT_ CCIPRJ_"),
    Token("Buildkite token", "bkua_ bkct_"),
    # Clouds: AWS IAM "unique identifiers", Google Cloud and Azure documentation, and the providers' own.
    Token("AWS key id", "AKIA ASIA ABIA ACCA A3T", "[A-Z0-9]", 14),
    Token("AWS Bedrock key", "ABSK bedrock-api-key-", BASE64, 32),
    Token("Google key", "AIza", WORD, 24),
    Token("Google OAuth secret", "GOCSPX-"),
    Token("Google OAuth token", "ya29.", DOTTED),
    Token("Google refresh token", "1//0", WORD, 30),
    Token("Azure key", "AccountKey= SharedAccessKey= SharedAccessSignature=", "[A-Za-z0-9+/=%&_.-]", 24),
    Token("Azure signature", "sig=", "[A-Za-z0-9+/=%]", 32),
    Token("Alibaba key id", "LTAI", ALNUM),
    Token("Tencent key id", "AKID", ALNUM, 28),
    Token("DigitalOcean token", "dop_v1_ doo_v1_ dor_v1_"),
    Token("Heroku key", "HRKU-"),
    Token("Fly.io token", "fo1_ fm1_ fm1r_ fm1a_ fm2_", BASE64),
    Token("Vercel token", "vcp_ vci_ vca_ vcr_ vck_ vercel_blob_rw_"),
    Token("Netlify token", "nfp_ nfc_ nfo_ nfu_ nfb_"),
    Token("Cloudflare token", "cfk_ cfut_ cfat_"),
    Token("Cloudflare origin key", "v1.0-", "[a-f0-9-]", 60),
    Token("Databricks token", "dapi dkea dose", "[a-f0-9-]", 24),
    Token("Snowflake token", "ver:1-hint:", DOTTED),
    Token("Yandex key", "AQVN YCAJ YCM", WORD, 30),
    Token("Tailscale key", "tskey-"),
    Token("OpenShift token", "sha256~"),
    # Chat and mail: api.slack.com/authentication/token-types, SendGrid, Mailgun, Brevo, Twilio documentation.
    Token(
        "Slack token",
        "xoxb- xoxp- xoxa- xoxr- xoxs- xoxo- xoxc- xoxd- xoxe- xoxe.xoxb- xoxe.xoxp- xapp-",
        "[A-Za-z0-9%-]",
    ),
    Token(
        "Slack webhook",
        "hooks.slack.com/services/ hooks.slack.com/workflows/ hooks.slack.com/triggers/",
        "[A-Za-z0-9/_-]",
    ),
    Token("Discord webhook", "discord.com/api/webhooks/ discordapp.com/api/webhooks/", "[A-Za-z0-9/_-]"),
    Token("Teams webhook", "webhook.office.com/webhookb2/", "[A-Za-z0-9/@_-]"),
    Token("SendGrid key", "SG.", DOTTED, 32),
    Token("Brevo key", "xkeysib- xsmtpsib-"),
    Token("Mailgun key", "key- pubkey-", HEX, 28),
    Token("Twilio key", "SK AC", HEX, 30),
    # Payment and shops.
    Token("Stripe key", "sk_live_ rk_live_ sk_test_ rk_test_ sk_prod_ rk_prod_ whsec_ sk_org_", BASE64, 12),
    Token("Square token", "sq0atp- sq0csp- sq0idp- EAAA", WORD, 20),
    Token("PayPal or Braintree token", "access_token$production$ access_token$sandbox$", "[A-Za-z0-9$]"),
    Token("Shopify token", "shpat_ shpca_ shppa_ shpss_ shptka_ shpit_"),
    Token("Razorpay key", "rzp_live_ rzp_test_", ALNUM, 12),
    Token("Flutterwave key", "FLWSECK- FLWSECK_TEST- FLWPUBK-"),
    Token("Facebook token", "EAAC EAAB EAAG", ALNUM, 40),
    # Package registries: npm and PyPI (a macaroon: base64 of a fixed head), RubyGems, Docker, NuGet, crates.io,
    # Artifactory.
    Token("npm token", "npm_", ALNUM),
    Token("PyPI token", "pypi-AgE"),
    Token("RubyGems key", "rubygems_"),
    Token("Docker token", "dckr_pat_ dckr_oat_"),
    Token("NuGet key", "oy2", "[a-z0-9]", 40),
    Token("Artifactory key", "AKCp cmVmd", ALNUM, 40),
    Token("Clojars token", "CLOJARS_"),
    # Work tools.
    Token("Linear key", "lin_api_ lin_oauth_"),
    Token("Notion token", "ntn_"),
    Token("Notion token", "secret_", ALNUM, 30),
    Token("Figma token", "figd_ figo_ figdr_"),
    Token("Airtable token", "pat", "[A-Za-z0-9.]", 60),
    Token("Asana token", "1/1 2/1", "[0-9/:a-f]", 40),
    Token("Dropbox token", "sl.", WORD, 40),
    Token("HubSpot token", "pat-na1- pat-na2- pat-eu1-"),
    Token("Postman key", "PMAK-"),
    Token("Typeform token", "tfp_"),
    Token("Contentful token", "CFPAT-"),
    Token("Resend key", "re_", "[A-Za-z0-9]+_[A-Za-z0-9]", 20),
    # Infrastructure and observability.
    Token("HashiCorp Vault token", "hvs. hvb. hvr."),
    Token("Pulumi token", "pul-", HEX),
    Token("Grafana token", "glsa_ glc_", BASE64),
    Token("Grafana key", "eyJrIjoi", BASE64, 40),  # base64 of {"k":"
    Token("New Relic key", "NRAK- NRJS- NRII- NRAA-"),
    Token("Sentry token", "sntrys_ sntryu_", BASE64),
    Token("Supabase key", "sbp_ sb_secret_"),
    Token("PlanetScale token", "pscale_tkn_ pscale_oauth_ pscale_pw_", DOTTED),
    Token("Neon key", "napi_", ALNUM, 30),
    Token("Doppler token", "dp.pt. dp.st. dp.ct. dp.sa. dp.scim. dp.audit.", DOTTED),
    Token("1Password token", "ops_", BASE64, 40),
    Token("Prefect key", "pnu_ pnb_", ALNUM),
    Token("Snyk token", "snyk_uat."),
    Token("Sonar token", "squ_ sqp_ sqa_", ALNUM, 30),
    Token("ReadMe key", "rdme_"),
    Token("Infracost key", "ico-", ALNUM, 28),
    Token("Shippo token", "shippo_live_ shippo_test_"),
    Token("Lightning key", "lit_", WORD, 32),
    # Private keys without their frame: the base64 of the fixed head of PKCS#1, PKCS#8, SEC1, Ed25519 and OpenSSH keys.
    Token(
        "private key",
        "AGE-SECRET-KEY-1 AGE-SECRET-KEY-PQ-1 "
        "MIIEvQIBADANBgkqhkiG MIIEvgIBADANBgkqhkiG MIIEpAIBAAKCAQEA MIIEowIBAAKCAQEA "
        "MIIJKQIBAAKCAgEA MIIJQgIBADANBgkqhkiG MHcCAQEEI MIGHAgEAMBMGByqGSM49 MC4CAQAwBQYDK2Vw b3BlbnNzaC1rZXktdjE",
        BASE64,
    ),
)

_HEX_UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
# What follows a provider's name when the hexadecimal digits after it are a version and no key.
_NO_VERSION = r"(?!\w*[-_. ]?(?:sha|hash|commit|rev|run|exp|id))"
_PROVIDERS = ("heroku", "twilio", "datadog", "cloudflare", "mailgun", "asana", "comet", "codecov", "algolia", "netlify")
SHAPES = (
    Shape("JSON web token", ("eyJ",), re.compile(r"(?<![A-Za-z0-9])eyJ[\w-]{8,}\.(?:eyJ)?[\w-]{8,}\.[\w-]*")),
    Shape("Terraform Cloud token", (".atlasv1.",), re.compile(r"\w{10,}\.atlasv1\.[\w=-]{16,}")),
    Shape("Telegram bot token", (":A",), re.compile(r"(?<![\w:])\d{6,16}:A[\w-]{30,}")),
    Shape("Mailchimp key", ("-us",), re.compile(r"(?<!\w)[0-9a-f]{28,}-us\d{1,2}(?!\w)")),
    Shape("Azure client secret", ("Q~",), re.compile(r"(?<![\w~.-])[\w~.]{3}\dQ~[\w~.-]{28,}")),
    Shape(
        "Azure key",
        ("AStA", "AzFu", "AzSe"),
        re.compile(r"[A-Za-z0-9+/_-]{40,}(?:AStA|AzFu|AzSe)[A-Za-z0-9+/_-]{4,}={0,2}"),
    ),
    Shape("1Password secret key", ("A3-",), re.compile(r"(?<!\w)A3-[A-Z0-9]{6}(?:-[A-Z0-9]{5,11}){4,5}")),
    Shape("Fly.io token", ("FlyV1 ",), re.compile(r"FlyV1 ([\w+/=,-]{16,})")),
    Shape(
        "private key",
        ("PRIVATE KEY",),
        re.compile(
            r"-{3,5} ?BEGIN [A-Z0-9 ]*PRIVATE KEY[A-Z ]*-{3,5}"
            r"(?:(?!-{3,5} ?END)[\s\S]){0,20000}(?:-{3,5} ?END[A-Z0-9 ]*-{3,5})?"
        ),
    ),
    Shape(
        "private key", ("PuTTY-User-Key",), re.compile(r"PuTTY-User-Key-File-\d(?:[\s\S]{0,4000}?Private-MAC: *\w+)?")
    ),
    Shape(
        "Google service account", ("service_account",), re.compile(r"""["']type["']\s*:\s*["']service_account["']""")
    ),
    Shape(
        "netrc login",
        ("machine",),
        re.compile(r"machine\s+\S+\s+login\s+\S+\s+(?:account\s+\S+\s+)?password\s+(\S+)"),
    ),
    Shape(
        "Weights & Biases key",
        tails("wandb"),
        re.compile(
            rf"(?i:wandb){_NO_VERSION}[\w.()]{{0,24}}[\s\"':=,(]{{1,8}}"
            rf"(?:(?:api|key|token|login|is)[\s=:]+){{0,3}}([0-9a-f]{{40}})(?!\w)"
        ),
    ),
    Shape(
        "Kaggle key",
        ("username",),
        re.compile(r"""["']username["']\s*:\s*["'][^"']{1,80}["']\s*,\s*["']key["']\s*:\s*["']([0-9a-f]{28,})["']"""),
    ),
    Shape(
        "key of a named provider",
        tails(*_PROVIDERS),
        re.compile(
            rf"(?i:{'|'.join(_PROVIDERS)}){_NO_VERSION}[\w. ]{{0,20}}[\"']?\s{{0,2}}[:=]\s{{0,2}}[\"']?"
            rf"({_HEX_UUID}|(?=[a-zA-Z_-]*\d)[A-Za-z0-9_-]{{32,64}})(?![\w-])"
        ),
    ),
)
# A Discord token begins with the base64 of a number, so no needle is worth looking for: every long run is tried.
DISCORD = re.compile(r"[MNO][A-Za-z0-9_-]{22,27}\.[\w-]{6,7}\.[\w-]{25,}")

URL_LOGIN = re.compile(
    r"[A-Za-z][A-Za-z0-9+.-]{1,20}://(?P<user>[^\s/:@\"'<>`]*)(?::(?P<word>[^\s/@\"'<>`]+))?@(?P<host>[\w.-]+|\[[0-9a-fA-F:]+\])"
)

# The name of a secret ENDS in one of these: `hub_token`, but not `tokenizer`, `token_type_ids` or `tokens_seen`.
_SECRET_NAME = (
    r"(?:pass(?:wd|word|phrase|code)|pwd|token|secret|credentials?|auth|authorization|bearer|cookie|connection[_-]?string"
    r"|(?:api|app|auth|access|account|private|secret|client|master|signing|encryption|subscription|service|shared|deploy"
    r"|kaggle)[_-]?key(?:[_-]?(?:base64|base|value|json))?)(?:_?\d{1,2})?"
)
NAME_NEEDLES = (
    "pwd",
    "PWD",
    *tails("pass", "token", "secret", "credential", "auth", "bearer", "cookie", "key", "connection"),
)
ASSIGNMENT = re.compile(
    rf"""(?ix)(?P<name>[\w.-]{{0,60}}?{_SECRET_NAME}) ["'`\]]{{0,3}} [ \t]*
    (?: (?: => | := | ={{1,3}} | : ) [ \t\v]{{0,3}} | (?<=\w) [ \t] (?=["']) )
    (?: (?:bearer|basic|token|digest) [ ]+ )?
    (?: "(?P<double>[^"\n\v]{{6,200}}) | '(?P<single>[^'\n\v]{{6,200}}) | (?P<bare>[^\s"'<>,;(){{}}\[\]`|]{{6,}}) )"""
)
OPTION = re.compile(rf"""(?i)--[\w-]{{0,40}}?{_SECRET_NAME}[ =]["']?(?P<bare>[^\s"'<>,;`]{{6,}})""")
BEARER = re.compile(r"(?i)\b(?:bearer|basic)[ \t\v]+(?P<bare>[A-Za-z0-9._~+/=-]{16,})")

# A part of a name: a word, CamelCase, a version, a short number. What is made of these alone is prose and no secret.
WORDISH = re.compile(
    r"[A-Za-z]?[a-z]{0,17}\d{0,4}|[A-Z]{1,15}\d{0,4}|v?\d{1,12}[a-zA-Z]{0,2}|[a-z]{0,12}(?:[A-Z][a-z]{2,12}\d{0,2}){1,7}"
    r"|[A-Z]{2,5}[a-z]{2,12}"
)
PLACEHOLDER = re.compile(
    r"(?i)[x0*.#?_-]+|<.*>?|\[.*\]|\$\{.*|\$\(.*|\$[A-Z_]+|\{.*"
    r"|%\w+%|@\w+@|.*\.\.\..*|.*…|your[-_ ].*|changeme.*|redacted.*"
    r"|example.*|placeholder.*|dummy.*|os\.environ.*|os\.getenv.*|getpass.*|env[.:].*|secrets\..*|self\..*|args\..*"
)
