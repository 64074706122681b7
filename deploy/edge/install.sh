#!/bin/sh
# Makes a Raspberry Pi class device (Debian or alike with systemd, Python 3.11 or 3.12) serve and train:
#
#   sudo deploy/edge/install.sh BUNDLE            # the folder, .tar or .tar.gz that `fl-server enroll` wrote
#   sudo deploy/edge/install.sh                   # the same device, a newer release of the software
#
#   --source PATH   what is installed: this repository (the default) or a wheel of it
#   --extras LIST   train (the default), or also grpc,parquet,tflite,opacus; "" for a device that only serves
#   --root DIR      put everything below DIR and leave users, services and owners alone: for a look at it
#
# Run it as often as you like: what is there already is not done again. A release that does not get ready gives way to
# the one before it.
#
#   /opt/edge-fl/releases/DIGEST/   environments, of which /opt/edge-fl/venv names the one in use
#   /var/lib/edge-fl/               the bundle, and the device's state beside it
set -eu
umask 022

fail() {
    echo "install.sh: $1" >&2
    exit "${2:-1}"
}

here=$(cd "$(dirname "$0")" && pwd)
source=$(cd "$here/../.." && pwd)
extras=train
root=
bundle=
while [ $# -gt 0 ]; do
    case $1 in
        --source | --extras | --root)
            [ $# -ge 2 ] || fail "$1 needs a value" 2
            case $1 in
                --source) source=$2 ;;
                --extras) extras=$2 ;;
                --root) root=$2 ;;
            esac
            shift 2
            ;;
        -*) fail "unknown option $1" 2 ;;
        *)
            [ -z "$bundle" ] || fail "one bundle, not also $1" 2
            bundle=$1
            shift
            ;;
    esac
done
python=${PYTHON:-python3}
opt=$root/opt/edge-fl
state=$root/var/lib/edge-fl
constraints=$here/../constraints.txt

# Before anything is changed.
[ -e "$source" ] || fail "--source: there is no $source" 2
[ -z "$bundle" ] || [ -e "$bundle" ] || fail "there is no $bundle" 2
[ -n "$bundle" ] || [ -f "$state/edge-agent.toml" ] || fail "name a bundle: this is no device yet" 2
[ -n "$root" ] || [ "$(id -u)" = 0 ] || fail "run it as root" 2
[ -n "$root" ] || command -v systemctl >/dev/null || fail "this machine has no systemd; see deploy/edge/Dockerfile"
"$python" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null ||
    fail "$python is not Python 3.11 or 3.12 with venv; apt-get install python3-venv, or name another with PYTHON="

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

read_device_id() {
    sed -n 's/^device_id *= *"\([^"]*\)".*/\1/p' "$1" | head -n 1
}

unpack_bundle() {
    mkdir "$work/bundle"
    if [ -d "$bundle" ]; then
        cp "$bundle"/* "$work/bundle/" 2>/dev/null || true
    else
        tar --extract --file "$bundle" --directory "$work/bundle" --no-same-owner --no-same-permissions
    fi
    config=$(find "$work/bundle" -maxdepth 2 -name edge-agent.toml -type f | head -n 1)
    [ -n "$config" ] || fail "$bundle holds no edge-agent.toml: a bundle comes from fl-server enroll" 2
    new=$(read_device_id "$config")
    if [ -f "$state/edge-agent.toml" ]; then
        old=$(read_device_id "$state/edge-agent.toml")
        # Its samples and its privacy budget are this device's, and would count as the other's.
        [ "$old" = "$new" ] || fail "this is device $old; $state must be removed before it becomes $new"
    fi
    mkdir -p "$state"
    chmod 700 "$state"
    for file in "$(dirname "$config")"/*; do
        if [ -f "$file" ] && [ ! -L "$file" ]; then
            name=$(basename "$file")
            install -m 600 "$file" "$state/.$name.new"
            mv "$state/.$name.new" "$state/$name"
        fi
    done
    # The service's user owns its folder, under whatever number it got.
    [ -n "$root" ] || chown -R --reference="$state/" "$state/"
}

compute_digest() {
    {
        if [ -f "$source" ]; then
            cat "$source"
        else
            (cd "$source" && find edge_agent fl_server models pyproject.toml -type f ! -name '*.pyc' -print0 |
                LC_ALL=C sort -z | xargs -0 cat)
        fi
        cat "$constraints"
        "$python" -c 'import sys; print(sys.version)'
        echo "$extras"
    } | sha256sum | cut -c 1-16
}

# An environment is made whole or not at all: the link to it comes last.
make_release() {
    release=$opt/releases/$(compute_digest)
    if [ ! -f "$release/complete" ]; then
        rm -rf "$release"
        mkdir -p "$release"
        "$python" -m venv "$release"
        "$release/bin/python" -m pip --disable-pip-version-check install --quiet \
            --constraint "$constraints" "$source${extras:+[$extras]}" || fail "pip could not install $source"
        : >"$release/complete"
    fi
    previous=
    [ ! -L "$opt/venv" ] || previous=$(readlink "$opt/venv")
    link_release "${release#"$root"}"
}

link_release() {
    ln -sfn "$1" "$opt/venv.new"
    mv -T "$opt/venv.new" "$opt/venv"
}

drop_old_releases() {
    for old in "$opt"/releases/*; do
        case ${old#"$root"} in
            "$(readlink "$opt/venv")" | "$previous") ;;
            *) rm -rf "$old" ;;
        esac
    done
}

start_service() {
    getent group edge-fl >/dev/null || groupadd --system edge-fl
    systemctl daemon-reload
    systemctl enable --quiet edge-agent
    if systemctl restart edge-agent; then
        return
    fi
    journalctl --unit edge-agent --lines 5 --no-pager --output cat >&2 || true
    if [ -n "$previous" ] && [ "$previous" != "${release#"$root"}" ]; then
        link_release "$previous"
        systemctl restart edge-agent
        fail "the new release did not get ready; the one before it serves again"
    fi
    fail "the service did not get ready; /opt/edge-fl/venv/bin/edge-agent doctor --config $state/edge-agent.toml says why"
}

[ -z "$bundle" ] || unpack_bundle
make_release
install -D -m 644 "$here/edge-agent.service" "$root/etc/systemd/system/edge-agent.service"
install -D -m 644 "$here/../OPERATING.md" "$opt/share/OPERATING.md"
[ -n "$root" ] || start_service
drop_old_releases
echo "device $(read_device_id "$state/edge-agent.toml") is installed below ${root:-/}"
