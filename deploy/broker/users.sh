#!/bin/sh
# Makes the users of the broker: `users.sh FOLDER HOST:PORT QUEUE...`
#
# Writes into FOLDER what is missing: `broker_password`, the password of Redis' user `default`, and for
# each other user its URL, `broker_url_<user>`. Writes `broker_config` in any case: the lines `user` for
# redis.conf or valkey.conf, for these passwords, queues, and version. docs/operations.md, "Users of the
# broker", says who uses which. For Redis 7 or later, or Valkey; channels are those of database 0.
#
# tests/deploy/test_broker_users.py runs everything under these users, and tries what they must not do.
set -eu
folder=$1 address=$2
shift 2

password() { # of a user, by its URL, which you may edit: no character of the password may need an escape
    sed -n 's|^[a-z]*://[^:]*:\([^@]*\)@.*|\1|p' "$folder/broker_url_$1"
}

fresh() {
    od -An -v -N24 -tx1 /dev/urandom | tr -d ' \n' # hexadecimal digits need no quoting
}

keep() { # standard input into the file $1, which all users may read: the folder is closed
    (set -C && cat >"$folder/$1")
    chmod 0444 "$folder/$1"
}

[ -e "$folder/broker_password" ] || fresh | keep broker_password
for user in producer server worker operator flower metrics; do
    [ -e "$folder/broker_url_$user" ] ||
        printf 'redis://%s:%s@%s/0\n' "$user" "$(fresh)" "$address" | keep "broker_url_$user"
done

# Keys. %R~ is read only; \x06\x16 comes from kombu.
lists='' produced='' indexed='' served='' watched='' letters=''
for queue in "$@"; do
    lists="$lists ~$queue \"~$queue\\x06\\x16[1-9]\""
    produced="$produced ~_kombu.binding.$queue ~_kombu.binding_permanent.$queue"
    produced="$produced ~zlora:ledger:$queue ~zlora:expiring:$queue ~zlora:outbox:$queue"
    produced="$produced %R~zlora:serves:$queue"
    produced="$produced ~zlora:recall:$queue ~zlora:recall:$queue:* ~zlora:cancel:$queue ~zlora:cancel:$queue:*"
    indexed="$indexed ~zlora:http:$queue:*"
    served="$served ~zlora:*:$queue %R~zlora:http:$queue:file:*"
    watched="$watched %R~zlora:*:$queue"
    letters="$letters ~zlora:dead:$queue ~zlora:poisoned:$queue ~zlora:requeued:$queue"
done
produced="$produced ~celery-task-meta-* ~zlora:job:* %R~zlora:lease:*"
replies='~*.celery.pidbox* ~celeryev.* ~_kombu.binding_deadlines'
for exchange in celery.pidbox reply.celery.pidbox celeryev; do
    replies="$replies ~_kombu.binding.$exchange ~_kombu.binding_permanent.$exchange"
done

# Commands.
any='+ping +client|setname +client|setinfo'
submit='+lpush +llen +exists' # of messages: no command that takes, replaces or expires a list
scripts='+eval +evalsha +script|load +script|exists +multi +exec'
produce="$scripts +hget +hmget +hgetall +hkeys +hset +hsetnx +hdel +hexists +expire +exists +zadd +zrem +zrank +time"
produce="$produce +lpush +info +wait +llen +blpop +get +mget +setex +publish +subscribe +unsubscribe +sadd"
index='+set +del +rename +incrby +pttl +zrange +zrevrange +zinter +zremrangebyscore +zremrangebyrank'
index="$index +hstrlen +hlen" # all of these for keys of the HTTP server only
receive="$scripts +publish +brpop +llen +del +exists +pexpire +sadd +srem +time +zadd +zrem +zrangebyscore"
look='+llen +lindex +zcard +zcount +get +hmget +time +hscan +eval +type +hlen' # +type and +hlen are for KEDA
serve="$produce $receive $look +set +incr +hincrby +rpush +lrange +smembers +watch +unwatch"
serve="$serve +zrange +zscore +zremrangebyrank +zremrangebyscore +pttl +client|tracking"

# Each user is one line: a backslash joins lines. Parentheses hold rights for keys or channels of their own.
umask 077
cat >"$folder/broker_config.new" <<END
user default on >$(cat "$folder/broker_password") ~* &* +@all
user producer on >$(password producer)$produced &celery-task-meta-* $any $produce ($lists $submit)
user server on >$(password server)$produced$indexed &celery-task-meta-* $any $produce +zcard +zscore \
 ($lists $submit) ($indexed $index)
user worker on >$(password worker)$lists$produced$served $replies ~zlora:lease:* ~unacked ~unacked_index ~unacked_mutex \
 &celery-task-meta-* &/0.celeryev/* $any $serve (+psubscribe +punsubscribe &/0.celery.pidbox &/0.celeryev/*)
user operator on >$(password operator)$produced &celery-task-meta-* &/0.celery.pidbox $any $produce \
 ($lists $submit) ($replies ~zlora:watcher:* $receive +get +set +zrange) \
 ($lists$watched %R~unacked %R~unacked_index $look +zrange +zrangebyscore) \
 ($letters +evalsha +zrange +zrangebyscore +zadd +zrem +zremrangebyrank +expire)
user flower on >$(password flower) $replies $any $receive &/0.celery.pidbox \
 (+psubscribe +punsubscribe &/0.celeryev/*) ($lists +llen)
user metrics on >$(password metrics)$lists ~unacked$watched $any $look
END
chmod 0444 "$folder/broker_config.new"
mv -f "$folder/broker_config.new" "$folder/broker_config"
