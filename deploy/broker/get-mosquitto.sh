#!/bin/sh
# Prints the path of a mosquitto 2; unpacks the operating system's package below FOLDER if the machine has none.
set -eu
folder=${1:?usage: get-mosquitto.sh FOLDER}
exec sh "$(dirname "$0")/../unpack-program.sh" mosquitto "$folder" mosquitto libcjson1 libdlt2 libmosquitto1
