# What `cargo xtask deploy` does on a host: a function per step, run by root's shell. Nothing here needs more than systemd,
# coreutils, diffutils, grep, tar and flock (util-linux).
#
#   /opt/rswap/RELEASE    all of one
#             /current    what is started
#             /good       what was last seen to be in order: a deployment that was cut off has not come to this
#             /previous   what was in order before that
set -eu
export LC_ALL=C
# Whatever root's is: what is to be read by others has to be, and what is not is said below.
umask 022
releases=/opt/rswap
units=/etc/systemd/system
# What has not come whole, with keys in it: root's alone, and gone with this shell.
incoming=$releases/.incoming

fail() {
    echo "$1" >&2
    exit 1
}

# A step of a deployment that was cut off may still be at it.
locked() {
    mkdir -p "$releases"
    exec 9>"$releases/.lock"
    flock --wait 120 9 || fail "a step of another deployment does not end ($releases/.lock)"
}

# The last word on a path is a rename: there is always either the old or the new.
point() { # LINK TARGET
    ln -sfn "$2" "$1.new"
    mv -T "$1.new" "$1"
}

is_link_of_ours() { # PATH
    [ -L "$1" ] && case $(readlink "$1") in "$releases"/*) true ;; *) false ;; esac
}

is_unit_of_ours() { # UNIT
    for made in "$releases"/*/"$1.service"; do
        ! cmp -s "$made" "$units/$1.service" || return 0
    done
    return 1
}

main_pid() { # UNIT
    systemctl show --property=MainPID --value "$1"
}

# Whether the unit's process is the binary of a release.
runs() { # UNIT RELEASE
    pid=$(main_pid "$1")
    [ "$pid" != 0 ] && [ "$(readlink "/proc/$pid/exe")" = "$releases/$2/rswap" ]
}

instances() {
    # Not by echo, which may take a backslash for more than it is. An agent that takes a call and does not answer is none.
    printf 'instances=%s\n' "$(timeout 10 "$releases/current/rswap" ps --json 2>/dev/null | tr -d '\n')"
}

# What a link within the releases points to, if that is there.
points_to() { # LINK
    there=$(readlink "$releases/$1") && [ -e "$releases/$there/SHA256SUMS" ] && echo "$there"
}

# Whether everything of a release runs.
all_run() { # RELEASE
    runs rswap "$1" && { [ ! -e "$releases/$1/rswap-controller.service" ] || runs rswap-controller "$1"; }
}

# Something is there that is not ours to replace.
is_foreign() { # PATH
    { [ -e "$1" ] || [ -L "$1" ]; } && ! is_link_of_ours "$1"
}

look() { # RELEASE
    echo "system=$(uname -s) $(uname -m)"
    [ ! -d /run/systemd/system ] || echo systemd=yes
    for path in /usr/local/bin/rswap /etc/rswap/rswap.toml /etc/rswap/tls; do
        ! is_foreign "$path" || echo "foreign=$path"
    done
    for unit in rswap rswap-controller; do
        [ ! -e "$units/$unit.service" ] || is_unit_of_ours "$unit" || echo "foreign=$units/$unit.service"
        [ ! -e "/usr/lib/systemd/system/$unit.service" ] || echo "foreign=/usr/lib/systemd/system/$unit.service"
    done
    ! is_link_of_ours /etc/rswap/tls || echo certificates=yes
    [ ! -e "$units/rswap-controller.service" ] || ! is_unit_of_ours rswap-controller || echo controller=yes
    ! good=$(points_to good) || echo "good=$good"
    ! previous=$(points_to previous) || echo "previous=$previous"
    if (cd "$releases/$1" && sha256sum --check --status SHA256SUMS) 2>/dev/null; then
        echo "copied=$1"
    fi
    if current=$(readlink "$releases/current"); then
        echo "current=$current"
        ! all_run "$current" || echo active=yes
        instances
    fi
}

# Takes over what comes as a tar archive, if it comes whole.
receive() { # RELEASE
    locked
    trap 'rm -rf "$incoming" "$incoming.old"' EXIT
    trap 'exit 1' HUP INT PIPE TERM
    rm -rf "$incoming" "$incoming.old"
    mkdir -m 700 "$incoming"
    cd "$incoming"
    tar -x -f - --no-same-owner || fail "it did not arrive whole"
    sha256sum --check --quiet SHA256SUMS || fail "what arrived is not what was sent"
    # Whatever modes they had, and whatever was made of them on the way. The key is nobody else's at any time.
    [ ! -e tls/key.pem ] || chmod 600 tls/key.pem
    find . -mindepth 1 -type d -exec chmod 755 {} +
    find . -type f ! -path ./tls/key.pem -exec chmod 644 {} +
    chmod 755 rswap
    chmod 755 .
    sync
    # One of that name is damaged. It may be the one that runs: it is never gone for longer than between two renames.
    trap '' HUP INT PIPE TERM
    [ ! -e "$releases/$1" ] || mv -T "$releases/$1" "$incoming.old"
    mv -T "$incoming" "$releases/$1"
    cd /
}

# Whether the binary runs here, and reads its configuration.
try_out() { # RELEASE
    cd "$releases/$1"
    ./rswap --config rswap.toml doctor >/dev/null
}

# Makes `current` what runs.
start() {
    mkdir -p /etc/rswap /usr/local/bin
    # Somebody may have been there since it was looked at.
    for path in /usr/local/bin/rswap /etc/rswap/rswap.toml; do
        ! is_foreign "$path" || fail "$path is there, and was not made by a deployment"
    done
    point /usr/local/bin/rswap "$releases/current/rswap"
    point /etc/rswap/rswap.toml "$releases/current/rswap.toml"
    if [ -d "$releases/current/tls" ]; then
        ! is_foreign /etc/rswap/tls || fail "/etc/rswap/tls is there, and was not made by a deployment"
        point /etc/rswap/tls "$releases/current/tls"
    elif is_link_of_ours /etc/rswap/tls; then
        rm /etc/rswap/tls
    fi
    wanted=
    for unit in rswap-controller rswap; do
        if [ -e "$releases/current/$unit.service" ]; then
            # A copy: systemd reads units before /opt has to be there.
            cp "$releases/current/$unit.service" "$units/.$unit.new"
            mv -T "$units/.$unit.new" "$units/$unit.service"
            wanted="$wanted $unit"
        elif [ -e "$units/$unit.service" ]; then
            systemctl disable --quiet --now "$unit"
            rm "$units/$unit.service"
        fi
    done
    systemctl daemon-reload
    for unit in $wanted; do
        systemctl reset-failed "$unit" 2>/dev/null || true
        systemctl enable --quiet "$unit"
        systemctl restart "$unit"
    done
}

switch() { # RELEASE
    locked
    # Nothing says yet what was in order here: what ran is gone back to.
    if ! points_to good >/dev/null && ran=$(points_to current) && [ "$ran" != "$1" ]; then
        point "$releases/previous" "$ran"
    fi
    point "$releases/current" "$1"
    start
}

# Whether the controller answers, for as long as it may take.
controller_answers() { # RELEASE SECONDS
    until said=$(timeout 10 "$releases/$1/rswap" fleet status 2>&1 >/dev/null); do
        [ "$(date +%s)" -lt "$2" ] || fail "the controller of $1 does not answer: $said"
        sleep 0.2
    done
}

health() { # RELEASE SECONDS
    until=$(($(date +%s) + $2))
    # Also of an agent that takes the call and does not answer.
    timeout $(($2 + 5)) "$releases/$1/rswap" health --within "$2" || fail "the agent of $1 is not in order within $2 s"
    runs rswap "$1" || fail "the agent that answers is not the one of $1"
    controller=$releases/$1/rswap-controller.service
    [ ! -e "$controller" ] || controller_answers "$1" "$until"
    pids="$(main_pid rswap) $(main_pid rswap-controller)"
    sleep 2
    [ "$pids" = "$(main_pid rswap) $(main_pid rswap-controller)" ] || fail "it does not stay: systemd has started it anew"
    [ ! -e "$controller" ] || runs rswap-controller "$1" || fail "the controller of $1 does not run"
    instances
}

# It is in order. It is kept, as is what was in order before, if another was; all others go.
settle() { # RELEASE [BEFORE]
    locked
    [ -z "${2-}" ] || point "$releases/previous" "$2"
    point "$releases/good" "$1"
    for path in "$releases"/*-*; do
        case ${path##*/} in
        "$1" | "$(readlink "$releases/current")" | "$(readlink "$releases/previous" || true)") ;;
        *) rm -rf "$path" ;;
        esac
    done
}

# Whether nothing runs in a cgroup any longer.
has_ended() { # CGROUP
    ! grep -qs 'populated 1' "$1/cgroup.events"
}

last_words() {
    journalctl --unit=rswap --unit=rswap-controller --lines=10 --output=cat --no-pager 2>/dev/null || systemctl status --no-pager rswap || true
}

# All but the releases themselves and what agents keep.
remove() {
    locked
    for unit in rswap rswap-controller; do
        if [ -e "$units/$unit.service" ]; then
            systemctl disable --quiet --now "$unit"
            rm "$units/$unit.service"
        fi
    done
    systemctl daemon-reload
    for path in /usr/local/bin/rswap /etc/rswap/rswap.toml /etc/rswap/tls; do
        if is_link_of_ours "$path"; then rm "$path"; fi
    done
    rm -f "$releases/current" "$releases/previous" "$releases/good"
}
