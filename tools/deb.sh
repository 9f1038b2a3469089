#!/bin/bash
# Builds dist/blktrack_VERSION_all.deb, with debhelper, in a folder of its own that is like an
# unpacked release: the sources, man pages and completions made from them, and tools/debian as
# debian/. Two builds of the same sources are the same to the byte.
set -euo pipefail

say() { printf 'deb: %s\n' "$*"; }
die() { printf 'deb: %s\n' "$*" >&2; exit 1; }

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$PWD/.venv/bin/python
out=${1:-dist}

command -v dh dh_python3 dpkg-buildpackage >/dev/null ||
    die "debhelper or dh-python is missing; run make deb as root."
version=$(dpkg-parsechangelog -l tools/debian/changelog -S Version)
[[ $version == "$("$python" -c 'import blktrack; print(blktrack.__version__)')" ]] ||
    die "tools/debian/changelog is at $version, blktrack/__init__.py is not; write an entry for it."
SOURCE_DATE_EPOCH=$(dpkg-parsechangelog -l tools/debian/changelog -S Timestamp)
export SOURCE_DATE_EPOCH

work=$(mktemp -d --tmpdir blktrack-deb-XXXXXXXX)
trap 'rm -rf "$work"' EXIT
tree=$work/blktrack-$version
umask 022
mkdir -p "$tree"/completion/{bash,zsh}
cp -r README.md blktrack docs "$tree"
cp -r tools/debian "$tree/debian"
find "$tree" -name __pycache__ -prune -exec rm -rf {} +

"$python" tools/manpages.py "$tree/man"
"$python" -m blktrack completion bash >"$tree/completion/bash/blktrack"
"$python" -m blktrack completion zsh >"$tree/completion/zsh/_blktrack"
sed 's,@BLKTRACK@,/usr/bin/blktrack,' blktrack/systemd/blktrack.service \
    >"$tree/debian/blktrack.service"

(cd "$tree" && dpkg-buildpackage --build=all --no-sign) >"$work/log" 2>&1 || {
    cat "$work/log" >&2
    die "dpkg-buildpackage failed; its messages are above."
}
mkdir -p "$out"
cp "$work/blktrack_${version}_all.deb" "$out/"
say "done: $out/blktrack_${version}_all.deb"
