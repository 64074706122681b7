#!/bin/sh
# Prints the path of an nginx 1.19.5 or later; unpacks the operating system's package below FOLDER if there is none.
set -eu
folder=${1:?usage: get-nginx.sh FOLDER}
exec sh "$(dirname "$0")/../unpack-program.sh" nginx "$folder" nginx
