#!/bin/sh
# Prints the path of a mosquitto 2. If the machine has none, unpacks the operating system's package below
# the folder given, without installing it: no service is started and no root is needed.
set -eu
folder=${1:?usage: get-mosquitto.sh FOLDER}
PATH=$PATH:/usr/sbin:/usr/local/sbin

if found=$(command -v mosquitto); then
    echo "$found"
    exit 0
fi
if [ ! -x "$folder/mosquitto" ]; then
    if ! command -v apt-get >/dev/null || ! command -v dpkg >/dev/null; then
        echo "no mosquitto on PATH: install version 2 with this system's package tool (dnf, apk or brew install mosquitto)" >&2
        exit 1
    fi
    mkdir -p "$folder/packages"
    if [ "$(id -u)" = 0 ] && ! apt-cache show mosquitto >/dev/null 2>&1; then
        apt-get update -qq >&2
    fi
    (cd "$folder/packages" && apt-get download -qq mosquitto libcjson1 libdlt2 libmosquitto1 >&2) || {
        echo "the mosquitto package could not be downloaded: run 'apt-get update' or install mosquitto 2 by hand" >&2
        exit 1
    }
    for package in "$folder"/packages/*.deb; do
        dpkg -x "$package" "$folder/root"
    done
    libraries=$(dirname "$(find "$(cd "$folder" && pwd)/root" -name 'libmosquitto.so.1' | head -n 1)")
    printf '#!/bin/sh\nLD_LIBRARY_PATH=%s exec %s/root/usr/sbin/mosquitto "$@"\n' "$libraries" "$(cd "$folder" && pwd)" \
        >"$folder/mosquitto"
    chmod +x "$folder/mosquitto"
fi
"$folder/mosquitto" -h >/dev/null 2>&1 || [ $? -le 3 ] || {
    echo "the unpacked mosquitto does not start; install mosquitto 2 with apt-get" >&2
    exit 1
}
echo "$folder/mosquitto"
