//! Servers of several kinds move while clients talk to them over connections that they keep.

use std::{net::Ipv4Addr, path::Path, process::Command};

use anyhow::{Context, ensure};
use rswap_tests::{
    converse::{self, Connection},
    moves::{Pair, finish, program},
    reason_to_skip,
};

const SERVER: Ipv4Addr = Ipv4Addr::new(10, 88, 0, 10);
const CONNECTIONS: u64 = 8;

/// Starts `command`, talks to it over several connections, and moves it three times.
fn serves_through_moves(
    name: &str,
    port: u16,
    command: impl FnOnce(&Path) -> anyhow::Result<Vec<String>>,
    ask: fn(&mut Connection, u64, u64) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let pair = Pair::new()?;
    let command = command(pair.fleet.scratch())?;
    let words: Vec<&str> = command.iter().map(String::as_str).collect();
    pair.a.run(name, &["--net", &format!("{SERVER}/24")], &words)?;
    pair.wait_for_port(SERVER, port)?;
    let client = converse::converse(&pair.fleet.client, (SERVER, port).into(), CONNECTIONS, ask)?;
    client.wait_for(200, rswap_tests::moves::LIMIT)?;
    let moved = pair.three_moves(name, &[&client], 300);
    let talked = finish(name, client);
    moved.and(talked)
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

fn build(command: &mut Command) -> anyhow::Result<()> {
    let output = command.output().with_context(|| format!("cannot start {command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

#[test]
fn memcached_with_threads() -> anyhow::Result<()> {
    if reason_to_skip("memcached_with_threads").is_some() {
        return Ok(());
    }
    let command = |_: &Path| Ok(words(&["memcached", "-u", "nobody", "-m", "64", "-t", "4", "-U", "0"]));
    serves_through_moves("memcached", 11211, command, converse::memcached)
}

#[test]
fn an_asyncio_server() -> anyhow::Result<()> {
    if reason_to_skip("an_asyncio_server").is_some() {
        return Ok(());
    }
    let command = |_: &Path| Ok(words(&["python3", &program("asyncio_server.py").to_string_lossy()]));
    serves_through_moves("asyncio", 8000, command, converse::http)
}

#[test]
fn a_node_server() -> anyhow::Result<()> {
    if reason_to_skip("a_node_server").is_some() {
        return Ok(());
    }
    let command = |_: &Path| Ok(words(&["node", &program("server.js").to_string_lossy()]));
    serves_through_moves("node", 8000, command, converse::http)
}

#[test]
fn a_go_server() -> anyhow::Result<()> {
    if reason_to_skip("a_go_server").is_some() {
        return Ok(());
    }
    let command = |scratch: &Path| {
        let made = scratch.join("server");
        let cache = scratch.join("go-cache");
        build(
            Command::new("go")
                .args(["build", "-o"])
                .args([&made, &program("server.go")])
                .envs([("GO111MODULE", "off"), ("CGO_ENABLED", "0")])
                .env("GOCACHE", cache),
        )?;
        Ok(vec![made.to_string_lossy().into_owned()])
    };
    serves_through_moves("go", 8000, command, converse::http)
}

#[test]
fn a_java_server_with_threads_and_garbage() -> anyhow::Result<()> {
    if reason_to_skip("a_java_server_with_threads_and_garbage").is_some() {
        return Ok(());
    }
    let command = |scratch: &Path| {
        let classes = scratch.join("classes");
        build(Command::new("javac").arg("-d").args([&classes, &program("Server.java")]))?;
        // Performance counters would be a file in /tmp that is written through a mapping.
        let options = ["java", "-Xmx96m", "-Xms32m", "-XX:+UseG1GC", "-XX:-UsePerfData", "-cp"];
        Ok(words(&[options.as_slice(), &[&classes.to_string_lossy(), "Server"]].concat()))
    };
    serves_through_moves("java", 8000, command, converse::http)
}

#[test]
fn nginx_with_workers() -> anyhow::Result<()> {
    if reason_to_skip("nginx_with_workers").is_some() {
        return Ok(());
    }
    let command = |scratch: &Path| {
        let root = scratch.join("nginx");
        std::fs::create_dir(&root)?;
        let configuration = root.join("nginx.conf");
        std::fs::write(&configuration, NGINX.replace("ROOT", &root.to_string_lossy()))?;
        Ok(words(&["nginx", "-p", &root.to_string_lossy(), "-c", &configuration.to_string_lossy()]))
    };
    serves_through_moves("nginx", 8000, command, converse::http_echo)
}

/// Two workers that share the listening socket and a zone of memory.
const NGINX: &str = "
daemon off;
worker_processes 2;
pid ROOT/pid;
error_log ROOT/error.log;
events { worker_connections 64; }
http {
    access_log ROOT/access.log;
    client_body_temp_path ROOT/body;
    proxy_temp_path ROOT/proxy;
    fastcgi_temp_path ROOT/fastcgi;
    uwsgi_temp_path ROOT/uwsgi;
    scgi_temp_path ROOT/scgi;
    keepalive_requests 1000000;
    limit_req_zone $server_addr zone=all:1m rate=100000r/s;
    server {
        listen 8000;
        location ~ ^/([0-9]+)/([0-9]+)$ {
            limit_req zone=all burst=1000 nodelay;
            return 200 '$1:$2';
        }
    }
}
";
