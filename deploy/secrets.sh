#!/bin/sh
# Makes the secrets of docker-compose.yml in deploy/secrets/, or in the folder $1. Existing files are kept.
#
# Compose mounts each file with its owner and mode, and the containers have users of their own: so the
# files must be readable by all. The folder is closed to other users of this machine (0700), and a
# container gets only the files that it names.
#
# Other files of deploy/ that containers read are made readable too: after a clone under umask 077 they
# would not be.
#
# To replace secrets: docs/operations.md, "Rotate secrets".
set -eu
umask 077
folder=${1:-$(dirname "$0")/secrets}

command -v openssl >/dev/null || { # before any file is made
    echo "openssl is missing; it makes the certificate of the store" >&2
    exit 1
}

random() { # $1 bytes as hexadecimal digits, which need no quoting
    od -An -v -N"$1" -tx1 /dev/urandom | tr -d ' \n'
}

write() { # standard input into the new file $1, of mode $2
    (set -C && cat >"$folder/$1") # -C: fails if the file exists
    chmod "${2:-0444}" "$folder/$1"
}

missing() { # whether none of the files exists; ends if only some exist, because they share a secret
    there=0
    for name in "$@"; do
        [ ! -e "$folder/$name" ] || there=$((there + 1))
    done
    if [ "$there" -ne 0 ] && [ "$there" -ne $# ]; then
        echo "$folder has only some of $*: remove these, or restore the others" >&2
        exit 1
    fi
    [ "$there" -eq 0 ] || echo "kept: $*"
    [ "$there" -eq 0 ]
}

mkdir -p "$folder"
chmod 0700 "$folder"

# The users of the broker, for the queue of compose. Their rights are those of this version, also for old passwords.
queue=${ZLORA_QUEUE:-$(sed -n 's/^ZLORA_QUEUE=//p' "$(dirname "$0")/../.env" 2>/dev/null || true)}
sh "$(dirname "$0")/broker/users.sh" "$folder" broker:6379 "${queue:-gpu}"

if missing store_identities store_credentials; then
    key=$(random 10)
    secret=$(random 20)
    write store_identities <<END
{
  "identities": [
    {
      "name": "worker",
      "credentials": [{"accessKey": "$key", "secretKey": "$secret"}],
      "actions": ["Read:pictures", "List:pictures", "Write:pictures"]
    }
  ]
}
END
    printf '[default]\naws_access_key_id = %s\naws_secret_access_key = %s\n' "$key" "$secret" | write store_credentials
fi

if missing store_grpc; then # its name is never checked, and it is valid for 100 years
    pem=$(openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=nobody -days 36500 -keyout /dev/stdout 2>/dev/null) || {
        echo "openssl cannot make a certificate" >&2
        exit 1
    }
    printf '%s\n' "$pem" | write store_grpc
fi

if missing webhook_secret; then # you may add secrets
    printf 'whsec_%s\n' "$(random 24)" | write webhook_secret 0644 # 48 digits are also base64 of 36 bytes
fi

if missing flower_auth flower_metrics_password; then
    scraper=$(random 12)
    printf 'operator:%s\nprometheus:%s\n' "$(random 12)" "$scraper" | write flower_auth
    printf '%s\n' "$scraper" | write flower_metrics_password
fi

if missing grafana_password; then
    printf '%s\n' "$(random 12)" | write grafana_password # Grafana uses it at its first start only
fi

for token in hf_token civitai_token; do # fill in if you have one
    if missing "$token"; then
        write "$token" 0644 </dev/null
    fi
done

for mounted in s3 prometheus grafana; do
    find "$(dirname "$0")/$mounted" ! -perm -004 -exec chmod a+rX {} +
done
echo "Flower: operator and the password in $folder/flower_auth; Grafana: admin and $folder/grafana_password"
