#!/usr/bin/env bash
# A certificate authority and a server's certificate, for trying things out: make-dev-certs.sh FOLDER NAME...
# NAMEs are what clients call the server: host names or IP addresses. The keys are not for production: the authority's
# lies beside what it signed.
set -euo pipefail
umask 077

if (($# < 2)); then
    echo "usage: make-dev-certs.sh FOLDER NAME..." >&2
    exit 2
fi
folder=$1
shift
mkdir -p "$folder"
cd "$folder"

names=()
for name in "$@"; do
    if [[ $name =~ ^[0-9.]+$ || $name == *:* ]]; then names+=("IP:$name"); else names+=("DNS:$name"); fi
done

new_key() { openssl genpkey -quiet -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$1" 2>/dev/null ||
    openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$1"; }

if [[ ! -e ca-key.pem ]]; then
    new_key ca-key.pem
    openssl req -x509 -new -key ca-key.pem -days 365 -subj "/CN=Headrace development CA" -out ca.pem \
        -addext "basicConstraints=critical,CA:TRUE,pathlen:0" -addext "keyUsage=critical,keyCertSign,cRLSign"
fi
new_key tls-key.pem
openssl req -new -key tls-key.pem -subj "/CN=$1" |
    openssl x509 -req -CA ca.pem -CAkey ca-key.pem -CAcreateserial -days 90 -out tls-cert.pem -extfile <(
        printf 'subjectAltName=%s\n' "$(IFS=,; echo "${names[*]}")"
        printf 'basicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\n'
        printf 'extendedKeyUsage=serverAuth,clientAuth\n'
    ) 2>/dev/null
echo "$PWD: ca.pem for clients; tls-cert.pem and tls-key.pem for --tls-cert and --tls-key"
