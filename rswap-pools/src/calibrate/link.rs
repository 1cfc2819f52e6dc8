//! Links: bytes through one TCP connection to a peer that counts them.
//!
//! The sender sends for [`SEND_FOR`], then closes its side; the peer answers with the number of bytes (8, little endian).

use std::{
    io::{self, Read, Write},
    net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream},
    time::{Duration, Instant},
};

use super::{CalibrateError, Result, Stop, failed};

const SEND_FOR: Duration = Duration::from_secs(1);
const MOST_BYTES: u64 = 4 << 30;
const CHUNK_BYTES: usize = 128 << 10;
/// Without a byte for so long, either side gives up.
const SILENT_FOR: Duration = Duration::from_secs(5);

/// Sends to `peer`. `own` are the addresses of the link: when the way to the peer leads over another, nothing is sent.
pub fn link(
    peer: SocketAddr,
    own: &[IpAddr],
    stop: &Stop,
) -> std::result::Result<Vec<Result>, CalibrateError> {
    let mut stream =
        TcpStream::connect_timeout(&peer, SILENT_FOR).map_err(failed(format!("reach the peer {peer}")))?;
    let local = stream.local_addr().map_err(failed("ask for the own address"))?.ip();
    if !own.contains(&local) {
        return Err(CalibrateError::Refused(format!(
            "the way to {peer} does not lead over this link: it begins at {local}"
        )));
    }
    let timeouts = stream.set_write_timeout(Some(SILENT_FOR)).and(stream.set_read_timeout(Some(SILENT_FOR)));
    timeouts.map_err(failed("set a time limit"))?;
    let chunk = vec![0x5a; CHUNK_BYTES];
    let (began, mut sent) = (Instant::now(), 0);
    while began.elapsed() < SEND_FOR && sent < MOST_BYTES {
        stop.check()?;
        stream.write_all(&chunk).map_err(failed(format!("send to {peer}")))?;
        sent += CHUNK_BYTES as u64;
    }
    stream.shutdown(Shutdown::Write).map_err(failed(format!("send to {peer}")))?;
    let mut answer = [0; 8];
    stream.read_exact(&mut answer).map_err(failed(format!("get the answer of {peer}")))?;
    let received = u64::from_le_bytes(answer);
    if received != sent {
        return Err(CalibrateError::Refused(format!(
            "{peer} has {received} of {sent} bytes: it is no rswap"
        )));
    }
    Ok(vec![("send_bits_per_s", sent as f64 * 8.0 / began.elapsed().as_secs_f64())])
}

/// Counts what one connection sends, and answers with it.
pub fn serve(listener: &TcpListener) -> io::Result<(SocketAddr, u64)> {
    let (mut stream, from) = listener.accept()?;
    stream.set_read_timeout(Some(SILENT_FOR))?;
    stream.set_write_timeout(Some(SILENT_FOR))?;
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut received = 0u64;
    // More than this no benchmark of ours sends.
    while received <= MOST_BYTES {
        match stream.read(&mut chunk)? {
            0 => break,
            more => received += more as u64,
        }
    }
    stream.write_all(&received.to_le_bytes())?;
    Ok((from, received))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_counts_and_another_way_is_refused() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let peer = listener.local_addr().unwrap();
        let server = std::thread::spawn(move || (serve(&listener).unwrap().1, serve(&listener).unwrap().1));
        let found = link(peer, &[peer.ip()], &Stop::default()).unwrap();
        assert!(found[0].1 > 1e6, "{found:?}");
        let refused = link(peer, &[], &Stop::default()).unwrap_err();
        assert!(refused.to_string().contains("does not lead over this link"), "{refused}");
        let (sent, none) = server.join().unwrap();
        assert!(sent > 0 && none == 0);
    }
}
