#!/bin/sh
# Makes the bucket $BUCKET where it is not there yet, by SeaweedFS's own shell at $MASTER; status 1 where it cannot.
set -eu

ask() { # what the shell says to one command
    printf '%s\n' "$1" | timeout 5 weed shell -master="$MASTER" 2>&1
}

tries=30
until ask s3.bucket.list | grep -q "^ *$BUCKET[[:space:]]"; do
    if ! said=$(ask "s3.bucket.create -name $BUCKET"); then
        tries=$((tries - 1))
        if [ "$tries" -eq 0 ]; then
            echo "there is no bucket $BUCKET: $said" >&2
            exit 1
        fi
        sleep 1
    fi
done
echo "bucket $BUCKET is there"
