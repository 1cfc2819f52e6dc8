# What `cargo xtask deploy` does on a host: a function per step, run by root's shell. Nothing here needs more than systemd,
# coreutils, diffutils and grep.
set -eu
export LC_ALL=C
releases=/opt/rswap
units=/etc/systemd/system

fail() {
    echo "$1" >&2
    exit 1
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
    # Not by echo, which may take a backslash for more than it is.
    printf 'instances=%s\n' "$("$releases/current/rswap" ps --json 2>/dev/null | tr -d '\n')"
}

look() { # RELEASE CONTROLLER
    echo "system=$(uname -s) $(uname -m)"
    [ ! -d /run/systemd/system ] || echo systemd=yes
    for path in /usr/local/bin/rswap /etc/rswap/rswap.toml /etc/rswap/tls; do
        [ ! -e "$path" ] || is_link_of_ours "$path" || echo "foreign=$path"
    done
    for unit in rswap rswap-controller; do
        [ ! -e "$units/$unit.service" ] || is_unit_of_ours "$unit" || echo "foreign=$units/$unit.service"
        [ ! -e "/usr/lib/systemd/system/$unit.service" ] || echo "foreign=/usr/lib/systemd/system/$unit.service"
    done
    ! is_link_of_ours /etc/rswap/tls || echo certificates=yes
    if (cd "$releases/$1" && sha256sum --check --status SHA256SUMS) 2>/dev/null; then
        echo "copied=$1"
    fi
    if current=$(readlink "$releases/current"); then
        echo "current=$current"
        if runs rswap "$current" && { [ "$2" = false ] || runs rswap-controller "$current"; }; then
            echo active=yes
        fi
        instances
    fi
}

# Takes over what scp has brought, if it came whole.
receive() { # RELEASE DIRECTORY
    mkdir -p "$releases"
    rm -rf "$releases/.incoming"
    cp -r --preserve=mode "$2" "$releases/.incoming"
    rm -rf "$2"
    cd "$releases/.incoming"
    sha256sum --check --quiet SHA256SUMS || fail "what arrived is not what was sent"
    chown -R root:root .
    sync
    rm -rf "${releases:?}/$1"
    mv -T "$releases/.incoming" "$releases/$1"
}

# Whether the binary runs here, and reads its configuration.
try_out() { # RELEASE
    cd "$releases/$1"
    ./rswap --config rswap.toml doctor >/dev/null
}

# Makes `current` what runs.
start() {
    mkdir -p /etc/rswap /usr/local/bin
    point /usr/local/bin/rswap "$releases/current/rswap"
    point /etc/rswap/rswap.toml "$releases/current/rswap.toml"
    if [ -d "$releases/current/tls" ]; then
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
    if old=$(readlink "$releases/current") && [ "$old" != "$1" ]; then
        point "$releases/previous" "$old"
    fi
    point "$releases/current" "$1"
    start
}

switch_back() { # RELEASE
    point "$releases/current" "$1"
    start
}

health() { # RELEASE SECONDS CONTROLLER
    "$releases/$1/rswap" health --within "$2"
    runs rswap "$1" || fail "the agent that answers is not the one of $1"
    pids="$(main_pid rswap) $(main_pid rswap-controller)"
    sleep 2
    [ "$pids" = "$(main_pid rswap) $(main_pid rswap-controller)" ] || fail "it does not stay: systemd has started it anew"
    [ "$3" = false ] || runs rswap-controller "$1" || fail "the controller of $1 does not run"
    instances
}

# Whether nothing runs in a cgroup any longer.
has_ended() { # CGROUP
    ! grep -qs 'populated 1' "$1/cgroup.events"
}

last_words() {
    journalctl --unit=rswap --lines=10 --output=cat --no-pager 2>/dev/null || systemctl status --no-pager rswap || true
}

# All but the releases themselves and what agents keep.
remove() {
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
    rm -f "$releases/current" "$releases/previous"
}

# Keeps the current release and the one before.
forget_old() {
    for path in "$releases"/*-*; do
        case ${path##*/} in
        "$(readlink "$releases/current")" | "$(readlink "$releases/previous" || true)") ;;
        *) rm -rf "$path" ;;
        esac
    done
}
