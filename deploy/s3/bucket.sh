#!/bin/sh
# Makes the bucket $BUCKET unless it exists, by SeaweedFS's shell at $MASTER. Exit status 1 if that fails.
set -eu

weed_shell() { # the output of one command
    printf '%s\n' "$1" | timeout 5 weed shell -master="$MASTER" 2>&1
}

tries=30
until weed_shell s3.bucket.list | grep -q "^ *$BUCKET[[:space:]]"; do
    if ! answer=$(weed_shell "s3.bucket.create -name $BUCKET"); then
        tries=$((tries - 1))
        if [ "$tries" -eq 0 ]; then
            echo "cannot make the bucket $BUCKET: $answer" >&2
            exit 1
        fi
        sleep 1
    fi
done
echo "bucket $BUCKET exists"
