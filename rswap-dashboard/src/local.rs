//! Whether this host was asked by a name of its own.
//!
//! A browser on this host may have pages of strangers open. One of them can have its own name point to a loopback address (DNS
//! rebinding), and could read the answers then: to the browser they come from that name. The request says which name was asked.

use axum::http::{HeaderMap, header, uri::Authority};

/// What our own programs, and the examples in the documents, call whom they ask. No name of the public DNS is a single word.
const OWN_NAME: &str = "rswap";

/// Whether a request names this host: by `localhost`, a loopback address or `rswap`. Programs that name none are no browsers.
pub fn is_local(headers: &HeaderMap) -> bool {
    names_this_host(headers.get(header::HOST).map(|host| host.as_bytes()))
}

fn names_this_host(host: Option<&[u8]>) -> bool {
    let Some(host) = host else { return true };
    let Ok(authority) = Authority::try_from(host) else { return false };
    let name = authority.host().trim_start_matches('[').trim_end_matches(']');
    let is_loopback = name.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback());
    is_loopback || ["localhost", OWN_NAME].iter().any(|own| name.eq_ignore_ascii_case(own))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_this_host_are_answered() {
        for host in
            ["localhost", "LOCALHOST:7790", "127.0.0.1:7790", "127.1.2.3", "[::1]:7790", "[::1]", "rswap"]
        {
            assert!(names_this_host(Some(host.as_bytes())), "{host}");
        }
        assert!(names_this_host(None));
        let foreign = [
            "example.com",
            "localhost.example.com:7790",
            "127.0.0.1.example.com",
            "10.0.0.1",
            "rswap.example.com",
            "",
            "[::2]",
            "a b",
        ];
        for host in foreign {
            assert!(!names_this_host(Some(host.as_bytes())), "{host}");
        }
    }
}
