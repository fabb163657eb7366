#!/bin/sh
# Makes the demo's Secrets with new values in kubectl's current cluster. Values are passed in files that
# only this user can read, because all users can read command lines. The cluster refuses to replace
# existing Secrets.
set -eu
umask 077
users=$(cd "$(dirname "$0")/../../../broker" && pwd)/users.sh
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

fresh() { od -An -N 24 -tx1 /dev/urandom | tr -d ' \n'; }
key=$(fresh) secret=$(fresh)

sh "$users" . zlora-broker:6379 gpu # ZLORA_QUEUE of the overlay
# For KEDA: the address from its own namespace, and the user `metrics`.
printf 'zlora-broker.zlora.svc:6379' >address
printf 'metrics' >username
sed 's|.*:\(.*\)@.*|\1|' broker_url_metrics | tr -d '\n' >password
printf '[default]\naws_access_key_id = %s\naws_secret_access_key = %s\n' "$key" "$secret" >credentials
printf '{"identities": [{"name": "worker", "credentials": [{"accessKey": "%s", "secretKey": "%s"}],
  "actions": ["Read:pictures", "List:pictures", "Write:pictures"]}]}\n' "$key" "$secret" >s3.json
# The store's gRPC accepts only clients with this certificate, which no other service has.
openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=nobody -days 3650 -keyout grpc.key -out grpc.crt 2>openssl ||
  { cat openssl >&2; exit 1; }
printf 'admin:%s\n' "$(fresh)" >auth

kubectl get namespace zlora >namespace 2>&1 || kubectl create namespace zlora
make() { kubectl --namespace zlora create secret generic "$@"; }
make zlora-broker --from-file=broker_url_worker --from-file=broker_url_flower --from-file=broker_url_metrics \
  --from-file=broker_url_producer --from-file=broker_url_server --from-file=broker_url_operator --from-file=address --from-file=username \
  --from-file=password --from-file=broker_config
make zlora-store --from-file=credentials --from-file=s3.json --from-file=grpc.crt --from-file=grpc.key
make zlora-flower --from-file=auth
ZLORA_API_KEYS=keys.json zlora keys add demo # prints the key of the HTTP server
make zlora-api-keys --from-file=keys.json
