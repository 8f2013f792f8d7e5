# Shared by the scripts of this folder; sourced, not run.

tree=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
program=$(basename "$0")
architecture=amd64 # of the packages of a private apt
keyring=/usr/share/keyrings/debian-archive-keyring.gpg

say() { echo "$program: $*" >&2; }
fail() { say "$*"; exit 1; }

as_root() {
    if [[ $EUID -eq 0 ]]; then
        "$@"
    else
        command -v sudo >/dev/null || fail "this needs root, and there is no sudo: run as root: $*"
        sudo "$@"
    fi
}

# need_packages PACKAGE...: installs what is missing, after saying so.
need_packages() {
    local missing=() package
    for package in "$@"; do
        [[ $(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null) == installed ]] || missing+=("$package")
    done
    [[ ${#missing[@]} -gt 0 ]] || return 0
    command -v apt-get >/dev/null || fail "needs what Debian's packages ${missing[*]} hold; install them first"
    say "installs ${missing[*]}$([[ $EUID -eq 0 ]] || echo ' (with sudo)')"
    as_root apt-get -qq update
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300 \
        install -y --no-install-recommends "${missing[@]}" >&2 ||
        fail "could not install ${missing[*]}"
}

# mirror_address archive|security: the Debian mirror that this machine's own apt uses.
# apt itself is asked, so one-line and deb822 sources count alike. Other vendors use Debian's suite names too, but
# none of them has an "-updates" suite, so the mirror that has one goes first.
mirror_address() {
    local wanted=$1 codename bases
    local chosen=MANA_MIRROR_${wanted^^}
    if [[ -n ${!chosen:-} ]]; then
        echo "${!chosen%/}"
        return
    fi
    codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
    bases=$(apt-get --print-uris update 2>/dev/null | sed -nE "s#^'([^']*[^/'])/+dists/([^/']+)/InRelease'.*#\2 \1#p")
    case $wanted in
        archive) bases=$(grep -E "^($codename|stable|testing)-updates " <<<"$bases" || grep -E "^($codename|stable|testing|sid|unstable) " <<<"$bases" || true) ;;
        security) bases=$(grep -E "^($codename|stable|testing)-security " <<<"$bases" || true) ;;
    esac
    if [[ -n $bases ]]; then
        head -n 1 <<<"$bases" | cut -d ' ' -f 2
    elif [[ $wanted == security ]]; then
        echo "$(mirror_address archive)-security"
    else
        fail "this machine's apt names no Debian mirror: set $chosen to one's address"
    fi
}

# debian_sources SUITE...: an apt sources file (deb822) for these suites, on this machine's mirror.
debian_sources() {
    local suite kind archive security
    [[ -r $keyring ]] || need_packages debian-archive-keyring
    archive=$(mirror_address archive)
    security=$(mirror_address security)
    for suite in "$@"; do
        kind=archive
        [[ $suite == *-security ]] && kind=security
        printf 'Types: deb\nURIs: %s\nSuites: %s\nComponents: main\nArchitectures: %s\nTargets: Packages\nSigned-By: %s\n\n' \
            "${!kind}" "$suite" "$architecture" "$keyring"
    done
}

# private_apt DIR SUITE...: an apt of our own in DIR, which knows these suites and nothing of the machine's packages.
# The machine's apt settings (a proxy, say) stay in force, its hooks and sources do not.
# Afterwards `debian_apt get|cache ...` runs apt-get or apt-cache with it.
private_apt() {
    private_apt_dir=$1
    mkdir -p "$private_apt_dir"/{state/lists/partial,cache/archives/partial}
    debian_sources "${@:2}" >"$private_apt_dir/debian.sources"
    cat >"$private_apt_dir/apt.conf" <<EOF
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear APT::Architectures;
APT::Architecture "$architecture";
APT::Sandbox::User "root";
Acquire::Languages "none";
Acquire::GzipIndexes "false";
Dir::Etc::sourcelist "$private_apt_dir/debian.sources";
Dir::Etc::sourceparts "-";
Dir::State "$private_apt_dir/state";
Dir::State::status "/dev/null";
Dir::Cache "$private_apt_dir/cache";
Dir::Cache::pkgcache "pkgcache.bin";
Dir::Cache::srcpkgcache "srcpkgcache.bin";
EOF
    debian_apt get -qq --error-on=any update >&2 ||
        fail "could not read Debian's package lists from $(mirror_address archive): is it reachable?"
}

debian_apt() { "apt-$1" -c "$private_apt_dir/apt.conf" "${@:2}"; }

# unpack_package PACKAGE DIR: downloads a package of the private apt and unpacks it into DIR, installing nothing.
unpack_package() {
    local package=$1 into=$2 download
    download=$(mktemp -d "$private_apt_dir/download.XXXXXX")
    (cd "$download" && debian_apt get -qq download "$package" >&2) || fail "could not download $package"
    mkdir -p "$into"
    dpkg-deb -x "$download"/*.deb "$into" || fail "could not unpack $package"
    rm -r "$download"
}

series_of() { sed -E 's/^([0-9]+\.[0-9]+).*/\1/' <<<"$1"; }

# Debian's stable suites by the mark in the kernel's version; a security or backports kernel needs its base's compiler.
suite_of() {
    case $1 in
        *+deb13*) echo trixie ;;
        *) echo bookworm ;;
    esac
}

# in_folder COMMAND...: runs it in the build folder, as root there; without being root, in a user namespace.
in_folder() {
    local paths=(/usr/bin/env -i "PATH=/usr/sbin:/usr/bin:/sbin:/bin" "LC_ALL=C")
    if [[ $EUID -eq 0 ]]; then
        chroot "$folder" "${paths[@]}" "$@"
    else
        mmdebstrap --unshare-helper chroot "$folder" "${paths[@]}" "$@"
    fi
}

# make_folder NAME PACKAGES: sets folder to $drivers/$suite/NAME, a folder with these packages and all they need, which
# mmdebstrap makes from the private apt's sources.
make_folder() {
    folder=$drivers/$suite/$1
    [[ ! -e $folder/.complete ]] || return 0
    need_packages mmdebstrap
    say "makes a folder with the compiler for $1"
    rm -rf "$folder"
    mkdir -p "$drivers/$suite"
    mmdebstrap --quiet --variant=apt --include="$2" \
        --aptopt='APT::Sandbox::User "root"' "$suite" "$folder" - <"$private_apt_dir/debian.sources" >&2 ||
        fail "mmdebstrap could not make $folder"
    in_folder touch /.complete
}

# Where cargo leaves what it builds for release (the target is named in .cargo/config.toml).
binaries=$tree/target/x86_64-unknown-linux-gnu/release

# fetch_ordinary_kernel GUESTS: Debian's kernel for any machine, whose modules hold every NIC's driver, in GUESTS/amd64.
fetch_ordinary_kernel() {
    local guests=$1 guest=$1/amd64
    [[ ! -s $guest/version ]] || return 0
    local package version raw=$guest.partial/raw
    need_packages kmod xz-utils
    private_apt "$guests/.apt-amd64" trixie trixie-updates trixie-security
    package=$(debian_apt cache depends linux-image-amd64 | sed -nE 's/.*Depends: (linux-image-[0-9].*)/\1/p' | head -n 1)
    [[ -n $package ]] || fail "Debian carries no linux-image-amd64"
    version=${package#linux-image-}
    say "fetches $version"
    rm -rf "$guest" "$guest.partial"
    unpack_package "$package" "$raw"
    unpack_package busybox-static "$raw"
    mkdir -p "$guest.partial/lib/modules"
    cp -a "$raw"/{,usr/}lib/modules/"$version" "$guest.partial/lib/modules" 2>/dev/null || true
    cp "$raw/boot/vmlinuz-$version" "$guest.partial/vmlinuz"
    cp "$raw"/{,usr/}bin/busybox "$guest.partial/" 2>/dev/null || [[ -s $guest.partial/busybox ]] || fail "no busybox in busybox-static"
    rm -r "$raw"
    ln -s . "$guest.partial/usr"
    PATH=$PATH:/usr/sbin:/sbin depmod -b "$guest.partial" "$version"
    rm "$guest.partial/usr"
    echo "$version" >"$guest.partial/version"
    mv "$guest.partial" "$guest"
}

# modules_archive MODULES FILE MODULE...: an initramfs with these of a kernel's modules and what they need, in loading order
# (/extra/order), to be put behind another.
modules_archive() {
    local modules=$1 output=$2 root file module name
    shift 2
    root=$(mktemp -d)
    mkdir -p "$root/extra"
    for module in "$@"; do
        sed -nE "s#^([^:]*/${module/_/[_-]}\.ko[^:]*): ?(.*)#\1 \2#p" "$modules/modules.dep" | tr ' ' '\n' | sed '/^$/d' | tac
    done | awk '!seen[$0]++' | while read -r file; do
        name=${file##*/}
        name=${name%.xz}
        case $file in *.xz) xz -dc "$modules/$file" ;; *) cat "$modules/$file" ;; esac >"$root/extra/$name"
        echo "$name" >>"$root/extra/order"
    done
    (cd "$root" && find . | cpio -o -H newc --quiet) >"$output"
    rm -r "$root"
}

# What building takes: Rust, which is the user's to choose, and a linker.
need_toolchain() {
    command -v cargo >/dev/null || fail "needs Rust with cargo (rustup.rs, or the packages of your system)"
    command -v cc >/dev/null || need_packages gcc libc6-dev
}

# Builds everything for release, and fetches the emulator if this machine's KVM can't run guests.
prepare_to_boot() {
    (cd "$tree" && cargo build --release --workspace) || fail "the build failed"
    "$binaries/mana-vmm" check >/dev/null 2>&1 || "$tree/resources/fetch-emulator" ||
        fail "guests can't run here: $binaries/mana-vmm check says why"
}
