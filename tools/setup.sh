#!/bin/bash
# Makes a clone ready to run: Debian packages, then .venv with the Python packages and
# .venv/bin/blktrack in it. Needs root only while Debian packages are missing. Running it again
# changes nothing and takes a moment; two runs at once wait for each other.
#
#   tools/setup.sh        what blktrack and its demo need
#   tools/setup.sh dev    what its tests, benchmarks and packages need on top
set -euo pipefail

packages=(
    e2fsprogs      # demo: mkfs.ext4, fsck
    python3-bpfcc  # compiles the programs in the kernel; brings libbpf, which loads them
    python3-venv   # makes .venv
    mount          # mount, umount, losetup
    sqlite3        # demo: the database that is written while it is replicated
    util-linux     # fsfreeze, lsblk, wipefs
)
dev_packages=(
    blktrace       # benchmark: the established block tracer, for comparison
    cron           # tests: a schedule as cron runs it
    debhelper      # make deb
    debian-archive-keyring  # vmtest: what the kernels that are fetched are signed with
    debootstrap    # tests: a clean root that the package is installed in
    dh-python      # make deb
    faketime       # tests: a minute of cron in six seconds
    fdisk          # tests: sfdisk makes partitions
    fio            # tests, benchmark: load
    gcc            # benchmark: the minimal C program that copying is measured against
    iproute2       # tests: networks; the way to a replica on another host
    kmod           # vmtest: depmod, and modprobe inside
    libc6-dev      # its headers
    lintian        # tests: has the package the form that Debian asks for
    man-db         # tests: man and lexgrog read the man pages
    mandoc         # tests: its lint reads them too
    openssh-client # tests: ssh, ssh-keygen
    openssh-server # tests: the sshd of the host that a replica is on
    postgresql     # tests: a database that is replicated while it is written
    qemu-system-x86  # tests: a replica that boots
    rsync          # benchmark: what an incremental sync is measured against
    systemd        # tests: systemd-analyze reads the unit as systemd will
    tmux           # tests: the terminal that top is driven in
    xfsprogs       # tests: mkfs.xfs, xfs_repair
    zsh            # tests: completion
)

# Keeps Debian's postgresql from making a server of its own on this host; there during the install.
no_cluster=/etc/postgresql-common/createcluster.d/blktrack-setup.conf

# While this file is there Debian's openssh-server starts no server, now or at the next boot. It
# stays, as the tests want the program alone; purging the package removes it.
no_sshd=/etc/ssh/sshd_not_to_be_run

# The Python that python3-bpfcc belongs to: a python3 elsewhere in PATH cannot import bcc.
python=/usr/bin/python3
case ${1:-} in
    "") ;;
    dev) packages+=("${dev_packages[@]}") ;;
    *) echo "usage: tools/setup.sh [dev]" >&2 && exit 2 ;;
esac

say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

missing_packages() {
    local package
    local -A installed=()
    while read -r package; do
        installed[$package]=1
    done < <(dpkg-query -W -f '${db:Status-Status} ${Package}\n' "${packages[@]}" 2>/dev/null |
        sed -n 's/^installed //p')
    for package in "${packages[@]}"; do
        [[ -v installed[$package] ]] || printf '%s\n' "$package"
    done
}

check_python() {
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || die \
        "$("$python" --version) is too old, blktrack needs 3.11; use Debian 12, Ubuntu 24.04 or newer."
}

undo_guards() {
    # Without the server it would wait for one that is installed for other reasons.
    [[ ! -v made_no_sshd || -x /usr/sbin/sshd ]] || rm -f "$no_sshd"
    rm -f "$no_cluster"
    rmdir "${no_cluster%/*}" /etc/postgresql-common 2>/dev/null || true
}

install_packages() {
    ((EUID == 0)) || die "Debian packages are missing: $*; run make setup as root, or install them."
    command -v apt-get >/dev/null ||
        die "Packages are missing and apt-get is not here; install the equivalents of: $*."
    say "installing Debian packages: $*"
    local apt=(env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300
        -o Dpkg::Use-Pty=0)
    "${apt[@]}" update || say "apt-get update failed, of some source perhaps; going on without."
    trap undo_guards EXIT
    if [[ " $* " == *" openssh-server "* && ! -e $no_sshd ]]; then
        mkdir -p "${no_sshd%/*}"
        made_no_sshd=1
        echo "Made by blktrack's tools/setup.sh: its tests need the program sshd, not a server." \
            >"$no_sshd"
    fi
    if [[ " $* " == *" postgresql "* ]]; then
        mkdir -p "${no_cluster%/*}"
        echo 'create_main_cluster = false' >"$no_cluster"
    fi
    "${apt[@]}" install -y --no-install-recommends "$@" >/dev/null ||
        die "apt-get could not install $*; its message above says why."
    undo_guards
}

# One line that changes when .venv has to be made anew or completed.
wanted_stamp() {
    # The scripts in .venv/bin hold the path of the clone, so a moved clone needs new ones.
    printf '%s ' "$PWD" "$(readlink -f "$python")" "$("$python" --version)"
    cat pyproject.toml tools/setup.sh | sha256sum
}

make_venv() {
    say "installing Python packages into .venv"
    # Made without the system's packages so that pip takes no dependency from there, then
    # rewritten to see them: bcc is there and nowhere else.
    "$python" -m venv --clear .venv ||
        die "$python could not make .venv; reinstall python3-venv, or free some space."
    .venv/bin/python -m pip --disable-pip-version-check -qq install --editable '.[source,dev]' ||
        die "pip could not install the Python packages; its message above says why."
    "$python" -m venv --system-site-packages --without-pip .venv
}

# promtool reads figures and alert rules as Prometheus does. Debian's package would start a server
# on this host: only the tool is taken out of it. The tests that need it say so if it is missing.
fetch_promtool() {
    [[ -x .venv/bin/promtool ]] || command -v promtool >/dev/null && return
    say "fetching promtool out of Debian's package prometheus"
    local folder
    folder=$(mktemp -d)
    if chmod 755 "$folder" && (cd "$folder" && apt_get_download prometheus) &&
        dpkg-deb --extract "$folder"/prometheus_*.deb "$folder" &&
        install -m 755 "$folder/usr/bin/promtool" .venv/bin/.promtool.new; then
        mv .venv/bin/.promtool.new .venv/bin/promtool
    else
        say "no promtool: its tests cannot run; look at the message above, then run this again."
    fi
    rm -rf "$folder"
}

# With the lists of packages brought up to date if it is not in them.
apt_get_download() {
    apt-get -qq download "$1" 2>/dev/null && return
    ((EUID != 0)) || apt-get -qq update || true
    apt-get -qq download "$1"
}

check_result() {
    local message
    message=$(.venv/bin/python -c 'import bcc' 2>&1) ||
        die "$python cannot import bcc (${message##*$'\n'}); reinstall python3-bpfcc."
    [[ -x .venv/bin/blktrack ]] || die "pip made no .venv/bin/blktrack; remove .venv and try again."
}

main() {
    cd "$(dirname "${BASH_SOURCE[0]}")/.."
    command -v dpkg-query >/dev/null ||
        die "This system has no dpkg; make setup works on Debian and Ubuntu."
    unset PYTHONHOME PYTHONPATH
    exec 9<tools/setup.sh
    flock 9

    [[ ! -x $python ]] || check_python
    local missing
    mapfile -t missing < <(missing_packages)
    ((${#missing[@]} == 0)) || install_packages "${missing[@]}" 9<&-
    check_python

    local stamp=.venv/setup.stamp wanted
    wanted=$(wanted_stamp)
    if [[ ! -x .venv/bin/blktrack || ! -r $stamp || $(<"$stamp") != "$wanted" ]]; then
        make_venv 9<&-
        check_result
        printf '%s\n' "$wanted" >"$stamp"
        say "done: .venv/bin/blktrack"
    fi
    [[ ${1:-} != dev ]] || fetch_promtool 9<&-
    # pip compiled what it installed, but not the clone that it points at.
    .venv/bin/python -m compileall -qq blktrack || true
}

main "$@"
