#!/bin/sh
# Prints the path of PROGRAM. If the machine has none, unpacks the operating system's packages below FOLDER,
# without installing them: no service is started and no root is needed.
set -eu
usage="usage: unpack-program.sh PROGRAM FOLDER PACKAGE..."
program=${1:?$usage}
folder=${2:?$usage}
shift 2
PATH=$PATH:/usr/sbin:/usr/local/sbin

if found=$(command -v "$program"); then
    echo "$found"
    exit 0
fi
if [ ! -x "$folder/$program" ]; then
    if ! command -v apt-get >/dev/null || ! command -v dpkg >/dev/null; then
        echo "no $program on PATH: install it with this system's package tool (dnf, apk or brew install $program)" >&2
        exit 1
    fi
    mkdir -p "$folder/packages"
    if [ "$(id -u)" = 0 ] && ! apt-cache show "$1" >/dev/null 2>&1; then
        apt-get update -qq >&2
    fi
    (cd "$folder/packages" && apt-get download -qq "$@" >&2) || {
        echo "the $program package could not be downloaded: run 'apt-get update' or install $program by hand" >&2
        exit 1
    }
    for package in "$folder"/packages/*.deb; do
        dpkg -x "$package" "$folder/root"
    done
    root=$(cd "$folder/root" && pwd)
    libraries=$(find "$root" -name '*.so.*' -exec dirname {} + | sort -u | paste -sd:)
    printf '#!/bin/sh\nLD_LIBRARY_PATH=%s exec %s/usr/sbin/%s "$@"\n' "$libraries" "$root" "$program" \
        >"$folder/$program"
    chmod +x "$folder/$program"
fi
"$folder/$program" -h >/dev/null 2>&1 || [ $? -le 3 ] || {
    echo "the unpacked $program does not start; install it with apt-get" >&2
    exit 1
}
echo "$folder/$program"
