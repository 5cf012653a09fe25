#!/bin/sh
# A certificate for this pod, signed by the cluster's own authority: certificate.sh AUTHORITY_FOLDER OUTPUT_FOLDER.
# AUTHORITY_FOLDER has ca.crt and ca.key. Names: POD_IP, and every service of NAMESPACE, by which workers call the head.
set -eu
umask 077
authority=$1 output=$2
openssl req -newkey rsa:2048 -nodes -subj "/CN=ultralong-ray" -keyout "$output/tls.key" -out "$output/tls.csr" 2>/dev/null
names="IP:${POD_IP:-127.0.0.1},IP:127.0.0.1,DNS:localhost,DNS:*.${NAMESPACE:-default}.svc,DNS:*.${NAMESPACE:-default}.svc.cluster.local"
printf 'subjectAltName=%s\nextendedKeyUsage=serverAuth,clientAuth\n' "$names" >"$output/names"
openssl x509 -req -in "$output/tls.csr" -CA "$authority/ca.crt" -CAkey "$authority/ca.key" -set_serial "0x$(openssl rand -hex 16)" \
  -days "${DAYS:-30}" -extfile "$output/names" -out "$output/tls.crt" 2>/dev/null
cp "$authority/ca.crt" "$output/ca.crt"
rm "$output/tls.csr" "$output/names"
