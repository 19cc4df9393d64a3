"""Secrets are taken out of what agents read, in every documented form, and what only looks like one stays."""

import base64
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from conftest import Service, git, plugin, until
from hypothesis import given
from hypothesis import strategies as st

import cco_sidecar
from cco_sidecar import REDACTED, SECRET_NAME, Redaction, redact, redaction
from tests.benchmarks.redaction import SECRET_FORMS, by_form, found_again, samples

is_secret = plugin("_withheld").is_secret
MakeService = Callable[..., Service]
TOKEN = "gh" + "p_" + "aB3xY7pQ9rT2vW5z8mN4" + "cD6fG1hJ0kL2sE9u"  # no scanner takes this file for a leak
RANDOM = "aB3xY7pQ9rT2vW5z" + "8mN4cD6fG1hJ0kL2sE9u"
KEY = "-----BEGIN RSA " + "PRIVATE KEY-----\n" + ("MIIEvQIBADANBgkqhkiG9w0BAQEFAASC" * 2 + "\n") * 30
NAMES = list(dict.fromkeys(form.name for form in SECRET_FORMS))


@pytest.mark.parametrize("name", NAMES)
def test_every_form_is_found_in_every_surrounding(name: str) -> None:
    rng = random.Random(3)
    again = found_again(name, samples(rng)[name], rng, 200)
    assert again >= (198 if name.startswith("assigned") else 200)  # a random text may happen to look less than random


def test_the_module_alone_finds_every_form_too() -> None:
    rng, alone = random.Random(3), Redaction().redact
    found = {name: found_again(name, make, rng, 100, alone) for name, make in samples(rng).items()}
    assert min(found.values()) >= 98, found  # a random text may be without any digit
    assert alone(f"a = 1\n{KEY}\nb = 2\n") == (f"a = 1\n{REDACTED}{KEY.count(chr(10)) * chr(10)}\nb = 2\n", 1)
    for text in (
        "sk-toggleable__label-arrow",
        "key-value-store-with-a-long-name",
        "password: str",
        "token = get_token()",
    ):
        assert alone(text) == (text, 0)


def test_the_forms_of_the_measurement_are_those_of_the_plugins() -> None:
    assert set(samples(random.Random(1))) == set(NAMES)


@pytest.mark.parametrize(
    ("content", "left"),
    [
        ("postgres://user:Zq9-blue@db/x", f"postgres://user:{REDACTED}@db/x"),
        ("clone https://user:Zq9@blue-ok@host/x", f"clone https://user:{REDACTED}@host/x"),
        (
            "redis://:Zq9-blue@cache:6379 and https://a:Zq9-red@b",
            f"redis://:{REDACTED}@cache:6379 and https://a:{REDACTED}@b",
        ),
        ("aws_secret_access_key = " + "aB3/" * 10, f"aws_secret_access_key = {REDACTED}"),
        ("Account" + "Key=" + "aB3/" * 21 + "xy==;End", f"AccountKey={REDACTED};End"),
        ('client_secret = "' + "aB3xY7pQ9rT2vW5z" + '8mN4"', f'client_secret = "{REDACTED}"'),
        ("password: '" + "0123456789abcdef" * 2 + "'", f"password: '{REDACTED}'"),
    ],
)
def test_only_the_secret_is_taken_out_of_its_surroundings(content: str, left: str) -> None:
    assert redact(content) == (left, left.count(REDACTED))


@pytest.mark.parametrize(
    "content",
    [
        "https://user:password@example.org", "postgres://postgres:postgres@localhost/db", "http://user:pass@host", "amqp://guest:guest@localhost",
        "https://{user}:{password}@host", "https://$USER:$PASSWORD@host", "https://<user>:<password>@host", "ftp://a:****@host",
        "http://[::1]:8080/@x", "https://host:8080/path@1", "see https://docs.example/a: b@c", "git@github.com:org/project.git",
        'if "-----BEGIN RSA ' + 'PRIVATE KEY-----" in text:\n    return True\n' + "x = 1\n" * 50,
        "The line -----BEGIN PRIVATE " + "KEY----- begins a key.\n", "AKI" + "AIOSFODNN7EXAMPLE",
        "aws_secret_access_key = wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
        'token = "the-quick-brown-fox-jumps"',
        'password_field_label = "Please enter your password"', 'secret = os.environ["A_LONG_NAME_OF_A_VARIABLE"]',
        'sha256 = "' + "0123456789abcdef" * 4 + '"', 'checksum: "' + "aB3xY7pQ9rT2vW5z8mN4" + '"',
        'token_type = "urn:ietf:params:oauth:token-type:jwt"',
        "class TASK: SKIP = 1", "sk-toggleable__label-arrow", "task-management-and-more-words-in-a-row-here",
        "key-value-store-with-a-long-name-0123456789",
        "", "-----BEGIN PUBLIC KEY-----\nabc\n-----END PUBLIC KEY-----", "-----BEGIN CERTIFICATE-----\nabc\n-----END CERTIFICATE-----",
        "0123456789abcdef" * 4, "task-" + "a" * 40, "class Disk-manager: sk = 'skeleton'", "ghp" + "_short",
        "AKI" + "A in lower case: akia" + "abcdefghij234567", "s" + "k-learn is scikit-learn", "eyJ" + "hbGciOiJIUzI1NiIs...",
        "import npm_package_name_that_is_long_enough", "550e8400-e29b-41d4-a716-446655440000",
        "https://github.com/org/project/commit/" + "0123456789abcdef" * 2 + "01234567",
    ],
)  # fmt: skip
def test_what_only_looks_like_a_secret_stays(content: str) -> None:
    assert redact(content) == (content, 0)


PASSED = """
    Authorization: Bearer {R} | curl -H 'authorization: token {R}' x | "Authorization": "Basic {P}"
    X-API-Key: {R} | api-key: {R} | login --token={R} | login --password {P} | run --api-key "{R}" | --client-secret {P}
    GET /x?access_token={R} | https://h/x?a=1&sig={R} | client_secret=abc8Q~{R} | aws_session_token = {R}{R}{R}
    COHERE_API_KEY={R}abcd | export CLOUDFLARE_API_TOKEN={R} | DD_API_KEY=0a1b2c3d4e5f67890a1b2c3d4e5f6789
    "secret": {R}, | aB3xY7pQ9rT2vW.atlasv1.{R}{R} | ntn_{R}abcdef | figd_{R}abcd | dp.pt.{R}abcdefg
    https://discord.com/api/webhooks/123456789012345678/{R}{R} | //registry.npmjs.org/:_authToken={R}
    Server=db;User Id=sa;Password={P}; | jdbc:postgresql://h/db?user=a&password={P} | Driver=x;Pwd={P}
    machine h login me password {P}
    https://{R}@host/x.git | https://{R}:x-oauth-basic@host/x | https://u:Zq9/w{P}@host/x | https://u:Zq9@{P}/x@host/r
    https://u:S3@{P}/ET@host | https://u:Zq9%40{P}@host
"""
PASSED_CASES = [case.strip().replace("\\n", "\n") for line in PASSED.strip().splitlines() for case in line.split(" | ")]


@pytest.mark.parametrize("case", PASSED_CASES)
def test_what_is_passed_as_a_secret_is_redacted(case: str) -> None:
    password = RANDOM[:14]
    content = case.replace("{R}", RANDOM).replace("{P}", password)
    left, number = redact(f"a = 1\n{content}\nb = 2\n")
    assert number and left.startswith("a = 1\n") and left.endswith("\nb = 2\n")
    assert password not in left and "0a1b2c3d" not in left and "w" + password not in left


CODE = """
    Authorization: Bearer $TOKEN | "Authorization: Bearer TOKEN" | Authorization: Bearer <your-token>
    "Authorization": f"Bearer {token}" | Authorization: Bearer ${{ secrets.GITHUB_TOKEN_2 }} | Authorization: Basic realm
    token = get_token() | password: str | --token=$TOKEN | --token "$TOKEN2" | --password <password1>
    api_key=os.environ["OPENAI_API_KEY_2"] | apiKey: process.env.OPENAI_API_KEY2 | --password-file secrets/pw1.txt
    password = user.password | secret=settings.AZURE_OPENAI_Key2 | access_token: getSdkOAuth2TokenValue(
    token = request.headers.get("X-Token-2") | --token TOKEN | ?access_token={token} | ?token=$TOKEN
    client_secret=your-client-secret-here | Password=***; | ;Password={password1}; | jdbc:x?user=a&password=${PW1}
    login or password | login with your password please | npm publish --token | sha256=0123456789abcdef0123456789abcdef
    mail user@example.com | git@github.com:o/r | https://x/@scope/pkg | https://user@example.com/x | http://h:4873/@scope/a
    http://host:port/a@b | docker://alpine:3.19@sha256:abc | https://unpkg.com/react@18.2.0/index.js
    https://github.com/orgs/x/teams@y | http://localhost:3000/users/me@example.com | https://user:password@host/@x
    public_key_token=b77a5c561934e089 | def f(password=None, token2=None): | token: 123e4567-e89b-12d3-a456-426614174000
    password = getpass() | token = request.token | password = None | token = "page-2-of-10-pages" | model_token = "gpt-4-turbo-0613"
    tokens_for = "claude-3-5-sonnet-20241022" | secret = "path/to/secret-2.txt" | password = "{{ vault_password_1 }}"
    --secret id=npmrc1,src=x | --password file:pw1.txt | token_type=Bearer&expires_in=3600
"""


@pytest.mark.parametrize("content", [case.strip() for line in CODE.strip().splitlines() for case in line.split(" | ")])
def test_code_placeholders_and_addresses_are_no_secrets(content: str) -> None:
    assert redact(f"a\n{content}\nb\n") == (f"a\n{content}\nb\n", 0)


def test_a_key_that_the_files_end_cuts_off_is_redacted_and_nothing_else() -> None:
    key = (
        "-----BEGIN EC "
        + "PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,00\n\n"
        + ("A1b2" * 16 + "\n") * 5
    )
    lines = "\n" * key.count("\n")  # those that follow keep their numbers
    assert redact("before\n" + key) == ("before\n" + REDACTED + lines, 1)
    assert redact(f'KEY = "{key}-----END EC PRIVATE ' + 'KEY-----"\nafter = 1\n') == (
        f'KEY = "{REDACTED}{lines}"\nafter = 1\n',
        1,
    )


@pytest.mark.parametrize("secret", [TOKEN, KEY + "-----END RSA " + "PRIVATE KEY-----", f'password = "{RANDOM}"'])
def test_a_secret_is_found_wherever_the_windows_of_a_long_text_end(secret: str) -> None:
    window = cco_sidecar.WINDOW
    for before in (window - len(secret) - 1, window - len(secret) // 2, window - 1, window, 2 * window - 7):
        text = ("word \n" * window)[: before - 1] + "\n" + secret + "\n" + "word \n" * 100
        left, number = redact(text)
        assert number == 1 and RANDOM not in left and "MIIE" not in left and TOKEN not in left
        assert (left.count("\n"), left.count("word")) == (text.count("\n"), text.count("word"))


BLOCK = base64.b64encode(random.Random(2).randbytes(300_000)).decode()
LONG_KEYS = {
    "of a photograph's length": (BLOCK[:40_000], "PGP PRIVATE KEY BLOCK", "\n"),
    "of more than 5,000 lines": (BLOCK, "RSA PRIVATE KEY", "\n"),
    "with escaped line ends": (BLOCK, "PRIVATE KEY", "\\n"),
    "in one line": (BLOCK, "PRIVATE KEY", ""),
}


@pytest.mark.parametrize(("block", "kind", "ends"), LONG_KEYS.values(), ids=LONG_KEYS)
@pytest.mark.parametrize("reader", [Redaction, plugin("_redaction").MeasuredRedaction], ids=["alone", "plugins"])
def test_of_a_long_key_nothing_is_left(reader: type[Redaction], block: str, kind: str, ends: str) -> None:
    lines = [block[at : at + 64] for at in range(0, len(block), 64)]
    key = "\n".join([f"-----BEGIN {kind}-----", ends.join(lines), f"-----END {kind}-----"])
    for before in (0, cco_sidecar.WINDOW - 2_000, cco_sidecar.WINDOW - len(key) // 2):
        text = "word \n" * (max(before, 0) // 6) + key + "\nlast words\n"
        left, number = reader().redact(text)
        assert number == 1 and not [line for line in lines if line[:40] in left], (before, number)
        assert (left.count("\n"), left.count("word")) == (text.count("\n"), text.count("word"))
    assert block[:40] not in msgspec.json.encode(reader().redact_json({"artifacts": {"key": key}})[0]).decode()


def test_a_long_text_is_searched_while_other_threads_go_on() -> None:
    turns, text = 0, "://a:" * 400_000
    with ThreadPoolExecutor() as pool:
        search = pool.submit(redact, text)
        while not search.done():
            turns += 1
            time.sleep(0.001)
    assert turns > len(text) / cco_sidecar.WINDOW, "it has to let go of the interpreter after each window"


def test_long_texts_without_secrets_take_time_in_proportion_to_their_length() -> None:
    armour = "-----BEGIN PRIVATE " + "KEY-----\n"
    for text in (
        armour + "A" * 300_000 + "!",
        armour * 10_000,
        *(hint * 50_000 for form in SECRET_FORMS for hint in form.hints),
        '= "' * 100_000,
        *(
            sign * (1_000_000 // len(sign))
            for sign in ("a", "=", '"', "a=", "://u:", "key=a", "--token ", "?a=", "login x ", "a@")
        ),
        "://" + "a:" * 300_000,
    ):
        redact(text)  # a pattern that backtracks would not come back
        Redaction().redact(text[:200_000])


SLOW = """
import resource, sys
from cco_sidecar import Redaction, redact
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
GIVEN = [f'token = "{part * (190 // len(part))}+"\\n' for part in ("0_", "a0.", "00/", "-a", "0-a_")]
for text in ("eyJ", "gsk_", "sbp_", "://a:", "-----BEGIN PRIVATE " + "KEY-----\\nA: b", "--", *GIVEN):
    (redact if sys.argv[1] == "plugins" else Redaction().redact)(text * (2_000_000 // len(text)))
print("done")
"""


@pytest.mark.parametrize("by", ["alone", "plugins"])
def test_what_repeats_the_beginning_of_a_secret_takes_little_work(by: str) -> None:
    done = subprocess.run([sys.executable, "-c", SLOW, by], capture_output=True, text=True)
    assert done.stdout == "done\n", "its limit of the processor's time has ended it"


BOTH = pytest.mark.parametrize("kind", [Redaction, plugin("_redaction").MeasuredRedaction], ids=["alone", "plugins"])
GIVEN = "k3j4h5g6f7d8" + "s9a0"


@BOTH
@pytest.mark.parametrize(
    ("value", "left", "number"),
    [
        ({"api_key": GIVEN}, {"api_key": REDACTED}, 1),
        ({"a": [{"db": {"DB_PASSWORD": GIVEN, "port": 5432}}]}, {"a": [{"db": {"DB_PASSWORD": REDACTED, "port": 5432}}]}, 1),
        ({"tokens": [GIVEN, 7, GIVEN + "x"], "b": GIVEN}, {"tokens": [REDACTED, 7, REDACTED], "b": GIVEN}, 2),
        ({"Authorization": f"Bearer {GIVEN}"}, {"Authorization": f"Bearer {REDACTED}"}, 1),
        ([{"client_secret": {"x": 1}}, GIVEN], [{"client_secret": {"x": 1}}, GIVEN], 0),
        ({"tokens": [{}, GIVEN]}, {"tokens": [{}, REDACTED]}, 1),
        ({"a": {"secret": [[{}], GIVEN]}}, {"a": {"secret": [[{}], REDACTED]}}, 1),
        ({"secrets": [["a"], GIVEN]}, {"secrets": [["a"], REDACTED]}, 1),
    ],
)  # fmt: skip
def test_a_field_of_json_whose_name_tells_of_a_secret_is_redacted_as_in_code(
    kind: type[Redaction], value: Any, left: Any, number: int
) -> None:
    assert kind().redact_json(value) == (left, number)


@BOTH
@pytest.mark.parametrize(
    "value",
    [
        {"token": "abc", "tokens": 12, "password": None, "secret": True},
        {"password": "getpass()", "token_expires_at": "2025-11-18T10:00:00Z", "note": "password"},
        {"metrics": {"tokens_used": 15000}, "token": "see the vault, entry 12 of the team"},
        ["api_key", GIVEN],
    ],
)
def test_a_field_of_json_without_a_secret_stays_whatever_it_is_called(kind: type[Redaction], value: Any) -> None:
    assert kind().redact_json(value) == (value, 0)


def test_what_is_quoted_and_given_to_a_secrets_name_is_redacted_by_the_plugins_where_it_is_without_them() -> None:
    rng, alone, plugins = random.Random(5), Redaction().redact, plugin("_redaction").MeasuredRedaction().redact
    for alphabet in "abcdefghijk0123456789 0123456789abcdef 0123456789 ABCDEFGHIJ01234567 aB3xY7pQ9rT2vW5z".split():
        for length in (12, 15, 19, 20, 31, 64):
            for name in ("password", "DB_PASSWD", "api_key", "passphrase", "clientSecret", "pwd", "authToken"):
                text = f'{name} = "{"".join(rng.choices(alphabet, k=length))}"'
                assert plugins(text)[1] >= alone(text)[1], text


def test_this_projects_own_sources_hold_no_secret() -> None:
    root = Path(__file__).parent.parent
    for path in [
        *root.glob("*.py"),
        *root.glob("*.md"),
        *root.glob("plugins/*/*.py"),
        *root.glob("tests/benchmarks/*.py"),
    ]:
        assert not by_form(path.name, path.read_text(), False).total(), path


SECRET_FILES = """
    .env .env~ .env-prod .env_local #.env# .#.env .env.bak .env.production .env2 deploy/.env.staging.old prod.env
    prod.env.bak app.env.local .env.swp .envrc .envrc.local .envs/.local/.django x.tfvars x.tfvars.json
    terraform.tfstate terraform.tfstate.backup terraform.tfstate.1700000000.backup prod.auto.tfvars.json
    a/b.tfstate.bak .npmrc .npmrc.bak .npmrc-ci .netrc.bak .netrc~ _netrc .pypirc.old .yarnrc.yml web/.yarnrc.yml
    .pgpass.orig .git-credentials.bak .htpasswd-old .vault_pass .vault_password .dev.vars auth.json .codex/auth.json
    home/.local/share/opencode/auth.json .composer/auth.json x/auth.toml .claude/.credentials.json
    .gemini/oauth_creds.json .azure/accessTokens.json config/accessTokens.json msal_token_cache.json token.json
    github_token.txt .token home/.config/gcloud/application_default_credentials.json
    home/.config/gcloud/configurations/config_default home/.config/gh/hosts.yml dotfiles/.m2/settings.xml
    .m2/settings-security.xml .config/glab-cli/config.yml .docker/config.json .gradle/gradle.properties
    .bash_history .zsh_history .python_history home/.psql_history .node_repl_history .zhistory .histfile
    fish_history ConsoleHost_history.txt .bash_history~ .mysql_history id_rsa id_rsa.bak ID_RSA .id_rsa.swp
    id_ed25519_sk deploy_rsa ssh_host_ed25519_key server.key.old server.pem.1 tls.key~ cert.p12.bak keystore.jks
    credentials credentials.json credentials.bak secrets.yaml secrets.nix passwords.nix secrets.prod.yaml secrets_local.toml db-password.txt
    prod-credentials.yml aws_credentials passwords.txt api_keys.json clientSecret.json client_secret_123.json
    service-account-1.json firebase-adminsdk-x1.json appsettings.Secrets.json config/master.key db.password
    app.secret prod.secret.exs secrets.sh credentials-copy.json x/secrets(1).json auth-old.json Credentials~.json
    dbPassword.yml rootkey.csv admin_accessKeys.csv .secrets kubeconfig prod.kubeconfig kubeconfig.bak x.keytab
    home/.my.cnf vpn.ovpn .ssh/config home/.aws/config .kube/config store.p12 example.com.key templates/server.pem
    locales/prod.env auth.json~ .docker.bak/config.json .ssh-old/config .aws.orig/config .config/gh.bak/hosts.yml
    .config/hub.bak .config/hub .claude.json .claude.json.backup .flaskenv .flaskenv.bak env env.production env.local env.bak
    .config/github-copilot/hosts.json .kaggle/kaggle.json .fly/config.yml .netlify/config.json local.settings.json
    x/prod.pubxml x.publishsettings .gitcookies .erlang.cookie .mbsyncrc .muttrc .curlrc nuget.config NuGet.Config
    profile/logins.json profile/key4.db sitemanager.xml wg0.conf wireguard/peer.conf key.json gcp-key.json
    serviceAccountKey.json group_vars/all/vault.yml host_vars/db/vault.yaml group_vars/prod.vault secret.env.gpg
    secrets.enc.yaml .env.production.enc secrets.json.age secring.gpg private.asc login.keychain-db login.keyring age-key.txt
    .sops/keys.txt shadow shadow.bak htpasswd npmrc pypirc my.cnf my.cnf.old cred.yml oauth2.json anthropic_key.txt
    wp-config.php wp-config.php.bak LocalSettings.php .config/gcloud/legacy_credentials/x/adc.json kube/config
    .env.local deploy/prod.env id_ed25519 x/server.PEM x.key main.tfstate .git-credentials
""".split()
ORDINARY_FILES = """
    .env.example .env.sample .env.template .env.dist .env.example.bak example.env env.d.ts .env.d.ts environment.py
    environment.yml env.py env.ts vite-env.d.ts src/env.js .envoy.yaml envoy.yaml env.sh key_utils.go keys.py
    keys.ts monkey.py keyboard.json public.pem jwt_public.key id_rsa.pub deploy_key.py id_rsa_test.go
    authentication.md auth.py auth.go auth.tf auth.yaml src/auth/index.ts locales/en/auth.json
    src/i18n/de/passwords.json auth.service.ts oauth.rb auth.json.example tokens.json design/tokens.json tokens.css
    token.py tokenizer.json tokenizer_config.json token_utils.json src/token.rs secrets.py credentials.ts
    src/credentials_form.py docs/secrets-of-success.md Secret.java password.svg password.png password_reset.html
    secrets.tf templates/secret.yaml chart/templates/credentials.yaml .github/workflows/secrets.yml
    sealed-secrets.yaml external-secrets.yaml credentials.schema.json secrets.example.yaml terraform.tfvars.example
    password-policy.yaml secret-scanning.yml history.py HISTORY.md history.txt .config/dotnet-tools.json
    settings.xml .m2/wrapper.properties gradle.properties pip.py .docker/nginx/Dockerfile .dockerignore .npmignore
    .yarnrc yarn.lock .eslintrc .babelrc package.json tsconfig.json README.md cookies.py session.ts .gitconfig
    variables.tf backup.sh main.py.bak notes~ wp-config-sample.php shadow.css Shadow.java shadow.ts .mcp.json mcp.json
    google-services.json .condarc pip.conf gradle.properties~ tokens.json.bak env.py src/env.sh env_config.yaml .environment
    environments/environment.prod.ts keymap.json hotkeys.yaml src.bak/main.go turkey.csv keywords.txt key.go keys/index.ts
    src-old/index.ts images/logo-old/a.svg release.tar.gz.asc language.txt vault.go vault.hcl cookie.ts oauth2.py age.ts
    public_key.json config.json my.css database.yml group_vars/all/main.yml fly.toml netlify.toml docs/wireguard.md
""".split()


@pytest.mark.parametrize("path", SECRET_FILES)
def test_files_of_the_kinds_that_hold_credentials_are_known_by_their_paths(path: str) -> None:
    assert is_secret(path)


@pytest.mark.parametrize("path", ORDINARY_FILES)
def test_source_and_examples_are_no_credentials(path: str) -> None:
    assert not is_secret(path)


PLAINLY_SECRET = """
    .env .env.production prod.env .envrc id_rsa keys/id_ed25519 server.pem tls.key store.p12 .aws/config .ssh/config
    .netrc .npmrc .pypirc .git-credentials credentials credentials.json secrets.yaml db-password.txt api_keys.json
    token.json terraform.tfstate prod.tfvars .bash_history kubeconfig .docker/config.json .config/gh/hosts.yml
    service-account-1.json .htpasswd app.jks x.ovpn .env.bak server.key.old
""".split()
PLAINLY_NOT = """
    main.py secrets.py src/auth/token.rs README.md docs/secrets-of-success.md package.json pyproject.toml environment.yml
    .github/workflows/ci.yml Dockerfile monkey.json keyboard.json .gitignore history.txt HISTORY LICENSE data.csv
""".split()


@pytest.mark.parametrize("path", [*PLAINLY_SECRET, *PLAINLY_NOT])
def test_the_module_alone_knows_plain_names_of_credentials(path: str) -> None:
    assert cco_sidecar.is_secret(path) is (path in PLAINLY_SECRET)


@pytest.mark.parametrize("ending", sorted({*cco_sidecar.LANGUAGES, ".unheard", "", ".py.in"}))
def test_what_is_in_a_folder_of_logins_or_called_an_environment_is_no_source_whatever_its_ending(ending: str) -> None:
    for path in (f".ssh/login{ending}", f"home/.aws/{ending or 'x'}", f".envs/.local/x{ending}"):
        assert cco_sidecar.is_secret(path) and is_secret(path), path
    if ending not in ("makefile", "dockerfile"):
        assert cco_sidecar.is_secret(f"x/.env{ending}")


@pytest.mark.parametrize("language", sorted({*cco_sidecar.LANGUAGES.values()} - {"makefile", "dockerfile"}))
def test_a_file_that_is_called_like_a_language_is_not_of_it(language: str) -> None:
    assert cco_sidecar.language_of(language) == cco_sidecar.language_of(f"src/{language}") == "unknown"
    for folder in ("secrets", ".ssh", "passwords", "vault"):
        assert cco_sidecar.is_secret(f"{folder}/{language}")
    assert is_secret(f".ssh/{language}")


@pytest.mark.parametrize(
    "ending", ".d .el .f .m .M .mm .nix .s .S .t .v .txt .conf .properties .sh .fish .psd1".split()
)
def test_an_ending_that_data_have_too_spares_no_file_that_calls_itself_secret(ending: str) -> None:
    for path in (f"credentials{ending}", f"secrets/prod{ending}", f"password{ending}", f"x/tokens/a{ending}"):
        assert cco_sidecar.is_secret(path), path
    assert not cco_sidecar.is_secret(f"src/main{ending}")


@pytest.mark.parametrize(
    "path", ["src/Token.sol", "lib/tokens.ml", "vault/main.py", ".github/scripts/token.py", "a/secrets.pl"]
)
def test_source_that_speaks_of_secrets_is_given_by_the_module_alone(path: str) -> None:
    assert not cco_sidecar.is_secret(path)


@pytest.mark.parametrize(
    ("value", "left", "number"),
    [
        (["plain", {"a": 1, "b": None}], ["plain", {"a": 1, "b": None}], 0),
        ({f"key {TOKEN}": [f'say "{TOKEN}"\n', 2.5]}, {f"key {REDACTED}": [f'say "{REDACTED}"\n', 2.5]}, 2),
        ([KEY, "AbCd", f"\\{TOKEN}"], [REDACTED + "\n" * KEY.count("\n"), "AbCd", f"\\{REDACTED}"], 2),
        (["ü\t" + TOKEN], ["ü\t" + REDACTED], 1),
    ],
)
def test_every_text_of_a_json_value_is_redacted_by_itself(value: Any, left: Any, number: int) -> None:
    assert redaction().redact_json(value) == (left, number)


@given(st.lists(st.text('ab\\"\0\1\n/ü,:[]')))
def test_the_plugin_finds_each_text_in_json(texts: list[str]) -> None:
    pieces = plugin("_redaction").pieces_of(msgspec.json.encode(texts))
    assert json.loads(plugin("_redaction").texts_of(pieces)) == (texts or [""])


WORDS_OF_SECRETS = "token Pwd api_ key secret passw Ord PASSPHRASE credential Authorization acc".split()
SAID = st.sampled_from(['"', "\\", ":", ":[", "a", "ü", *WORDS_OF_SECRETS])
VALUES = st.one_of(st.text('a":[\\'), st.lists(st.just("token")), st.none(), st.just(1), st.just({"a": 1}))


@given(st.dictionaries(st.lists(SAID, max_size=4).map("".join), VALUES, max_size=4))
def test_the_plugin_finds_the_fields_whose_names_tell_of_a_secret(value: dict[str, Any]) -> None:
    telling = {name for name, part in value.items() if isinstance(part, str | list) and SECRET_NAME.search(name)}
    pieces = plugin("_redaction").pieces_of(msgspec.json.encode(value))
    assert plugin("_redaction").has_secret_field(pieces) == bool(telling)


@pytest.mark.parametrize("kind", [Redaction, plugin("_redaction").MeasuredRedaction], ids=["alone", "with the plugin"])
def test_a_text_of_json_holds_no_secret_whatever_follows_it(kind: type[Redaction]) -> None:
    redaction = kind()
    for case in (*PASSED_CASES, "API_TOKEN={R}", "DB_PASSWORD: {R}"):
        text = case.replace("{R}", RANDOM).replace("{P}", RANDOM[:14])
        left, number = redaction.redact(text)
        value = {"a": text, "b": "the next text", "c": ["and one more"]}
        assert number or kind is Redaction, text
        assert redaction.redact_json(value) == (value | {"a": left}, number), text


PARTS = st.sampled_from([
    "PuTTY-User-Key-File-2: a\n", "Private-MAC: a", "login", "login bob ", "password ", "password " + GIVEN, "\0", "\n", '"',
    " x", "://u:", "pass1word@h", TOKEN, "token = ", f"'{GIVEN}'", GIVEN, KEY[:100], KEY[-60:], "-----END", "Bearer ",
    "?sig=", RANDOM, "--token ", "aws key = ",
])  # fmt: skip
TEXTS = st.lists(PARTS, max_size=3).map("".join)
FIELDS = st.one_of(TEXTS, st.sampled_from(["token", "api_key", "a", "x" * 90, "password" + "x" * 76]))


@BOTH
@given(st.dictionaries(FIELDS, st.one_of(TEXTS, st.lists(TEXTS, max_size=4)), max_size=4))
def test_many_texts_of_json_are_redacted_as_each_is_alone(kind: type[Redaction], value: dict[str, Any]) -> None:
    each, number = kind(), 0

    def alone(text: str, name: str | None = None) -> str:
        nonlocal number
        redacted, found = each.redact(text) if name is None else each.redact_given(text, name[-80:])
        number += found
        return redacted

    left = [(alone(name), [alone(x, name) for x in given] if isinstance(given, list) else alone(given, name))
            for name, given in value.items()]  # fmt: skip
    assert each.redact_json(value) == (dict(left), number)


@pytest.mark.parametrize(
    "value",
    [
        {"a": [TOKEN, *map(str, range(20_000))]},
        {"token": [f"x{number}" for number in range(20_000)], "b": GIVEN},
        {"password": [f"see the vault {number}" for number in range(20_000)]},
    ],
    ids=["a secret among others", "short texts of a secret's name", "long texts of a secret's name"],
)
def test_of_many_texts_few_are_searched_one_by_one(value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    each, searches = plugin("_redaction").MeasuredRedaction(), 0
    redact = each.redact

    def counted(content: str) -> tuple[str, int]:
        nonlocal searches
        searches += 1
        return redact(content)

    monkeypatch.setattr(each, "redact", counted)
    assert each.redact_json(value)[1] == (TOKEN in value.get("a", ()))
    assert searches < 100


REASONS = """
from cco_sidecar import NextAgent, hookimpl

@hookimpl
def next_agents(submission, proposals):
    return [NextAgent("qa-engineer", "high", "rule: " + CAUSE)]
"""


@pytest.mark.parametrize(
    ("cause", "left"),
    [
        (f"{TOKEN} was refused", f"{REDACTED} was refused"),
        ("postgres://app:Zq9-blue@db/x is down", f"postgres://app:{REDACTED}@db/x is down"),
        ("client_secret = '" + "aB3xY7pQ9rT2vW5z8mN4'", f"client_secret = '{REDACTED}'"),
        ("all is well", "all is well"),
    ],
)
def test_reasons_of_proposals_hold_no_secret_and_what_agents_publish_is_delivered_as_it_is(
    make_service: MakeService, tmp_path: Path, cause: str, left: str
) -> None:
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins/reasons.py").write_text(f"CAUSE = {cause!r}\n{REASONS}")
    client = make_service("--plugins", str(tmp_path / "plugins")).client()
    stored = client.store()
    assert [item["reason"] for item in stored["next_agents"]] == [f"rule: {left}"]
    (told,) = client.wait("agent_completed")["events"]
    assert [item["reason"] for item in told["data"]["next_agents"]] == [f"rule: {left}"]
    client.publish("noted", {"cause": cause})
    assert client.wait("noted")["events"][0]["data"] == {"cause": cause}


def test_what_leaves_for_other_agents_holds_no_secret(make_service: MakeService, repository: Path) -> None:
    def spelled(number: int) -> str:
        return f"{TOKEN[:-2]}{number:02}"

    git(repository, "commit", "-q", "--allow-empty", "-m", f"Log in with {spelled(1)}")
    git(repository, "checkout", "-q", "-b", f"try-{spelled(2)}")
    for name in (f"notes-{spelled(3)}.md", f"{spelled(4)}/main.py"):
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).write_text("x = 1\n")
    (repository / "package.json").write_text(json.dumps({"dependencies": {"left": f"https://x/{spelled(5)}/a.tgz"}}))
    ended = KEY + "-----END RSA " + "PRIVATE KEY-----"
    show = f"print('{spelled(6)}'); print({ended!r}); print('shown {spelled(12)}')"
    service = make_service("--agent-command", json.dumps([sys.executable, "-c", show]))
    client = service.client()
    result = {"decisions": [f"use {spelled(7)}"], "rationale": spelled(8), "artifacts": {"env": {"T": spelled(9)}}}
    stored = client.store(**result, files_modified=[f"{spelled(10)}.py"])
    task = {"agent_type": "python-specialist", "issue_id": "issue-1", "task": f"clone with {spelled(11)}"}
    agent = client.post("/api/agents/spawn", task).json()["agent_id"]
    until(lambda: client.get(f"/api/agents/{agent}/status").json()["state"] == "completed")
    answers = {
        path: client.get(path).text
        for path in (
            "/api/context/issue-1/security-auditor", f"/api/results/{stored['id']}", "/api/results", "/api/agents",
            "/api/events", f"/api/agents/{agent}/status", f"/api/agents/{agent}/logs",
        )
    }  # fmt: skip
    answers["file"] = Path(stored["storage_path"]).read_text()
    for path, text in answers.items():
        assert TOKEN[:-2] not in text, path
        assert KEY[40:90] not in text, path
        assert REDACTED in text, path
    assert f"shown {REDACTED}" in answers[f"/api/agents/{agent}/logs"]
    context = json.loads(answers["/api/context/issue-1/security-auditor"])["context"]
    assert context["git_context"]["recent_commits"][0]["message"] == f"Log in with {REDACTED}"
    assert context["git_context"]["branch"] == f"try-{REDACTED}"
    assert f"{REDACTED}/main.py" in context["project_structure"]["files"]
    assert context["previous_agent_outputs"][0]["decision"] == f"use {REDACTED}"
    assert context["metadata"]["redactions"] >= 8


def test_a_text_without_secrets_is_known_again_and_few_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    module = plugin("_redaction")
    redaction, secret = module.MeasuredRedaction(), f"token = '{TOKEN}'"
    monkeypatch.setattr(module.MeasuredRedaction, "clean", {})
    monkeypatch.setattr(module.MeasuredRedaction, "MOST", 3)
    assert redaction.redact("a = 1") == ("a = 1", 0)
    assert redaction.redact(secret)[1] == redaction.redact(secret)[1] == 1
    monkeypatch.setattr(redaction, "_redact", lambda content: (content, 0))
    assert redaction.redact("a = 1") == ("a = 1", 0) and redaction.redact("b = 1") == ("b = 1", 0)
    for number in range(5):
        redaction.redact(f"c = {number}")
    assert len(module.MeasuredRedaction.clean) == 3


@pytest.mark.parametrize("kind", [Redaction, plugin("_redaction").MeasuredRedaction], ids=["alone", "with the plugin"])
def test_large_json_is_searched_whenever_it_is_another(kind: type[Redaction]) -> None:
    value = {"files": [f"src/{number}/file.py" for number in range(2_000)]}
    again = kind()
    for _ in range(2):  # the second time the plugin knows it
        assert again.redact_json(value) == (value, 0)
    for _ in range(2):
        assert again.redact_json(value | {"note": TOKEN, TOKEN: 1}) == (value | {"note": REDACTED, REDACTED: 1}, 2)
    assert again.redact_json({"files": [*value["files"][1:], TOKEN]})[1] == 1


HANGS = """
import threading
from cco_sidecar import Results, hookimpl

class Hanging(Results):
    def __init__(self, *parts):
        super().__init__(*parts)
        self._redaction = self

    def redact_json(self, value):
        print("searching", flush=True)
        threading.Event().wait()

@hookimpl
def part_class(base):
    if issubclass(base, Results):
        return type("Hanging", (Hanging, base), {})
"""


@pytest.mark.parametrize("results", [1, 2, 12])
def test_a_stop_waits_for_no_search_and_ends_the_agents(
    make_service: MakeService, tmp_path: Path, results: int
) -> None:
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins/hangs.py").write_text(HANGS)
    sleep = json.dumps([sys.executable, "-c", "import time; time.sleep(600)"])
    service = make_service("--stop-agents", "--agent-command", sleep, "--plugins", str(tmp_path / "plugins"))
    client = service.client()
    agent = client.post("/api/agents/spawn", {"agent_type": "python-specialist", "issue_id": "issue-1", "task": "x"})
    pid = agent.json()["process_id"]
    with ThreadPoolExecutor(results) as pool:
        for number in range(results):
            long = {"report": "word " * 100_000, "number": number}
            pool.submit(lambda long=long: service.client().store(artifacts=long))
        until(lambda: service.log.count("searching") >= min(results, 5))
        assert service.stop() == 0
    assert not psutil.pid_exists(pid)
