"""Which files contexts say nothing of, because they are the service's own, and which they name and never give, because
they are of a kind that holds credentials.
"""

from __future__ import annotations

import functools
import os
import re

import cco_sidecar
from cco_sidecar import MB, FileFact, is_source, read_text_file
from cco_sidecar_plugins._patterns import late_pattern

OWN_FIRST_LINE = '"""Orchestration sidecar: one service that lets a team of coding agents work on one repository.'


def own_files(root: str, files: list[FileFact]) -> set[str]:
    """Those of ``files`` that are the service's and not the project's. Blocks.

    They are the module and its copies under any name (told by their first lines), and in the folder ``plugins/``
    beside each of these what speaks of it, with the folders that such plugins have for themselves. In the checkout of
    the sidecar itself, where the root's pyproject.toml names the project cco-sidecar, these are the project's.
    """

    def holds(path: str, pattern: str, limit: int = MB) -> bool:
        found = read_text_file(root, path, limit)
        return found is not None and re.search(pattern, found[0], re.MULTILINE) is not None

    if holds("pyproject.toml", r'^name\s*=\s*"cco-sidecar"'):
        return set()
    this = own_module(root)
    large = (file.path for file in files if file.size > LARGE)
    modules = {path for path in large if path == this or holds(path, OWN_FIRST_LINE, 2_000)}
    folders = tuple(f"{path[: path.rfind('/') + 1]}plugins/" for path in modules)
    plugins = {file.path for file in files if file.path.startswith(folders) and holds(file.path, "cco_sidecar")}
    below = tuple(f"{path[:-3]}/" for path in plugins if path.endswith(".py"))
    return modules | plugins | {file.path for file in files if file.path.startswith(below)}


def own_module(root: str) -> str:
    """The path of the module that runs, from the root where it is below it."""
    return os.path.realpath(str(cco_sidecar.__file__)).removeprefix(os.path.join(root, ""))


LARGE = 50_000  # bytes: the module has more


def may_tell_own(file: FileFact) -> bool:
    """Whether there may be files of the service's own because of what this one holds, where there were none."""
    return file.size > LARGE or file.path == "pyproject.toml"


@functools.lru_cache(400_000)
def is_secret(path: str) -> bool:
    """Whether a file is of a kind that holds credentials, by its path alone.

    The kinds are folders and files of tools' logins, environments, keys and states by their endings, and data files
    that call themselves credentials; copies and backups are of the kind of their originals. Source text is of none.
    """
    place, _, name = path.rpartition("/")
    parts = [COPY_MARKS.sub("", part) or part for part in place.lower().split("/")]
    folders, plain = f"/{'/'.join(parts)}/", COPY_MARKS.sub("", name.lower())
    is_text = is_source(plain)
    if (is_text and "/." not in folders + plain) or NOT_SECRET_NAME.search(plain):
        return plain.endswith(".secret.exs") or plain in ("wp-config.php", "localsettings.php")
    if SECRET_PLACE.search(folders + plain) or SECRET_DOTFILE.match(plain):
        return True
    if is_text or SECRET_NAME.search(plain):
        return not is_text
    stem, _, ending = plain.rpartition(".")
    said = COPY_MARKS.sub("", stem) if ending in DATA_ENDINGS else ending if stem else plain.lstrip(".")
    if plain.startswith(said) and name.lower() != name:  # words in camel case are told apart by their capitals
        said = re.sub(r"(?<=[a-z])(?=[A-Z])", "-", name[: len(said)])
    words = re.sub(r"[^a-z]+", "-", said.lower()).strip("-")
    calls_itself_secret = CREDENTIALS.fullmatch(words) or LOGIN_NAME.search(plain)
    return calls_itself_secret is not None and not TEXT_FOLDERS.search(folders)


def alternatives(names: str) -> str:
    return f"(?:{'|'.join(names.split())})"


COPY_MARKS = late_pattern(
    r"^(?:\.?#|~\$|copy of )|(?:[~#]|[ ._-]?\(\d+\)|[ ._-](?:\d+|copy|sw[a-p]|" + alternatives(
        "bak bkp backup old orig original saved? te?mp prev previous rej enc gpg age sops") + r"\d*))+$"
)  # fmt: skip
NOT_SECRET_NAME = late_pattern(
    r"(?:^|[._-])(?:examples?|samples?|template|tmpl|tpl|dist|schema|defaults)(?:[._-](?!com\b|org\b|net\b)|$)"
    r"|\.pub$|\.d\.ts$|(?:^|[._-])pub(?:lic)?(?:[._-]?key)?\.(?:pem|key)$|^(?:sealed|external)[_-]?secrets?\b"
)
SECRET_PLACE = late_pattern(
    "/" + alternatives(
        r"""\.(?:ssh|gnupg|aws|azure|gcloud|kube|oci|envs?|secrets|password-store|subversion/auth|snowflake)/
        \.config/(?:gcloud|gh|hub|glab-cli|op|rclone|doctl|heroku|hcloud|containers|sops|stripe|netlify|configstore)(?:/|$)
        \.config/(?:github-copilot|filezilla|nuget|pip|pypoetry)/ \.(?:kaggle|fly|netlify|snowsql|sops|keyrings|mutt)/
        kube/config$ legacy_credentials/ wireguard/[^/]*\.conf$
        (?:group|host)_vars/(?:.+/)?(?:.+\.)?vault(?:\.ya?ml)?$ age/keys\.txt$
        \.local/share/(?:keyrings|kwalletd)/ \.m2/settings[^/]*\.xml$ \.gradle/gradle\.properties$ \.bundle/config$
        \.docker/config\.json$ pip/pip\.conf$ \.pip/pip\.conf$ \.dbt/profiles\.ya?ml$""")
)  # fmt: skip
SECRET_DOTFILE = late_pattern(
    r"[._]" + alternatives(
        r"""(?:flask)?env(?:rc)? curlrc wgetrc muttrc mbsyncrc offlineimaprc gitcookies erlang\.cookie
        claude\.json netrc npmrc pypirc yarnrc\.ya?ml htpasswd htdigest git-credentials dockercfg dockerconfigjson
        pgpass my\.cnf mylogin\.cnf s3cfg boto terraformrc vault[_-](?:token|pass) passwd-s3fs databrickscfg
        (?:dev|prod)\.vars authinfo smbcredentials msmtprc fetchmailrc lesshst viminfo histfile [\w-]*history o?auth$
        """) + r"(?=[\W_\d]|$|(?<=pass)word)"
)  # fmt: skip
PLACES = alternatives(  # whose credentials a file holds
    """prod(?:uction)? dev(?:el(?:opment)?)? stag(?:e|ing) local live beta ci default private user my admin root team
    shared global main test(?:ing)? qa e2e"""
)
SECRET_NAME = late_pattern(
    r"\." + alternatives(  # endings
        r"""env pem key p8 p12 pfx pkcs12 jks bks keystore kdbx? ppk keytab jceks agekey ovpn tfstate tfvars(?:\.json)?
        kubeconfig tfrc(?:\.json)? keychain(?:-db)? agilekeychain keyring pubxml publishsettings
        """) + rf"(?:[._-]{PLACES})?$|"
    + "^" + alternatives(  # whole names
        rf"""env(?:[._-]{PLACES})? (?:npm|pypi|net)rc htpasswd htdigest g?shadow my\.cnf nuget\.config kubeconfig
        local\.settings\.json docker-config\.json sitemanager\.xml recentservers\.xml logins\.json key[34]\.db
        pgpass\.conf rclone\.conf wg\d+\.conf wallet\.dat fish_history consolehost_history\.txt
        (?:rootkey|.*accesskeys)\.csv (?:private|secret).*\.(?:asc|pgp)""") + "$|^secring"
    + r"\b|^\.?id_(?:rsa|dsa|ecdsa|ed25519)|[_-](?:rsa|dsa|ecdsa|ed25519)(?:[_-]key)?$"
    r"|(?:^|[_-])(?:service[_-]?accounts?|client[_-]?secrets?|adminsdk)(?:[_-].*|key|\.apps.*)?\.json$"
    r"|(?:^|(?<!public)[_-])key\.(?:json|txt|bin)$"
)  # fmt: skip
DATA_ENDINGS = frozenset(
    """json jsonl json5 yaml yml toml xml ini cfg conf config cnf properties txt csv tsv db sqlite dat plist sh bash zsh
    ps1 enc nix""".split()
)
LOGIN_NAME = late_pattern(
    r"(?:^|[._-])token(?:\.(?:json|txt|db))?$"
    r"|^\.?(?:o?auth2?|cookies)(?:[._-](?:old|bak|backup|copy))?\.(?:json|toml|txt|db|sqlite)$"
)
CREDENTIALS = late_pattern(
    "(?:.+-)?" + alternatives(
        """credentials? creds? secrets? passwords? passwd passphrase tokencache token-cache vault-pass
        (?:access|refresh|auth|api|bearer)-?tokens?
        (?:access|private|secret|api|master|signing|encryption|deploy)-?keys?""") + rf"(?:-(?:{PLACES}|enc|sops))*"
)  # fmt: skip
TEXT_FOLDERS = late_pattern(
    r"/(?:locales?|i18n|l10n|lang(?:uage)?s?|translations?|messages|schemas?|templates|\.github|paths|openapi)/"
)
