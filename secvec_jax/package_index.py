"""Download one file from the package indexes that pip is configured for, without building or running it.

    python -I package_index.py PROJECT FILENAME SHA256 TARGET

`pip download` runs the build backend of a source distribution. This script instead asks pip for a project's links,
using the user's configuration (indexes, proxies, certificates, credentials), and copies the bytes. The caller must
verify them: here SHA256 only selects among several files with the same name. It runs in a separate interpreter because
pip has no public API, and it imports nothing else from this package.
"""

import sys
from pathlib import Path


def main(project: str, filename: str, sha256: str, target: str) -> None:
    """Write the file to `target`, or exit with one line on stderr if no index has it."""
    from pip._internal.commands import create_command

    command = create_command("download")
    options, _ = command.parse_args(
        ["--no-input", "--no-cache-dir", "--retries=2", "--no-binary=:none:", "--only-binary=:none:"]
    )
    with command.main_context():
        session = command.get_default_session(options)  # type: ignore[attr-defined]
        finder = command._build_package_finder(options, session, ignore_requires_python=True)  # type: ignore[attr-defined]
        links = [candidate.link for candidate in finder.find_all_candidates(project)]
        links = sorted((link for link in links if link.filename == filename), key=lambda link: link.hash != sha256)
        if not links:
            sys.exit(f"ERROR: no package index that pip can reach has {filename}")
        response = session.get(links[0].url_without_fragment, headers={"Accept-Encoding": "identity"}, stream=True)
        if not response.ok:
            sys.exit(f"ERROR: the package index returned {response.status_code} for {filename}")
        with Path(target).open("wb") as out:
            for chunk in response.iter_content(1 << 20):
                out.write(chunk)


if __name__ == "__main__":
    main(*sys.argv[1:])
