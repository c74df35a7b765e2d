//! `sparse24 web`: the page that measures in a browser, served to this machine's own.
//!
//! The page is static files (see `src/web`): any other server does as well. Invariant: nothing is served but files that
//! lie in the folder itself.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, ensure};
use tiny_http::{Header, Method, Request, Response, Server, StatusCode};

use super::{Outcome, say};

/// Serve the page that measures 2:4 sparsity in a browser, on the GPU behind its WebGPU.
///
/// The page is made by `bash src/web/build.sh` of the sources. It is served to browsers of this machine alone, until
/// Ctrl-C. To measure other machines, put the folder on any static host with HTTPS, which browsers ask of WebGPU.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:
  # after `bash src/web/build.sh`, which makes target/web: then open the address that it prints
  sparse24 web
  sparse24 web my-copy --port 8080")]
pub(crate) struct Args {
    /// Folder of the page.
    #[arg(value_name = "DIR", default_value = "target/web")]
    folder: PathBuf,
    /// Port; 0 takes one that is free.
    #[arg(long, value_name = "N", default_value_t = 8024)]
    port: u16,
}

pub(crate) fn run(args: &Args) -> Result<Outcome> {
    let start = args.folder.join("index.html");
    ensure!(start.is_file(), "{}: is not there; `bash src/web/build.sh` makes the page", start.display());
    let address = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), args.port);
    let server = Server::http(address).map_err(|e| anyhow!("port {}: {e}", args.port))?;
    let address = server.server_addr().to_ip().context("the server has no address")?;
    say(&format!("serving {} at http://localhost:{}/ until Ctrl-C", args.folder.display(), address.port()));
    for request in server.incoming_requests() {
        // A browser that hung up hears nothing.
        let _ = answer(&args.folder, request);
    }
    Ok(Outcome::Fine)
}

fn answer(folder: &Path, request: Request) -> std::io::Result<()> {
    let path = request.url().split(['?', '#']).next().unwrap_or_default();
    let name = match path.strip_prefix('/').unwrap_or(path) {
        "" => "index.html",
        name => name,
    };
    let is_plain = name.bytes().all(|c| c.is_ascii_alphanumeric() || b"-_.".contains(&c)) && !name.starts_with('.');
    let is_read = matches!(request.method(), Method::Get | Method::Head);
    let path = folder.join(name);
    // Before anything is opened: a name may be absolute, or that of a pipe.
    let is_served = is_plain && is_read && path.metadata().is_ok_and(|file| file.is_file());
    let (status, kind, body) = match is_served.then(|| fs::read(path)) {
        Some(Ok(body)) => (200, kind_of(name), body),
        _ => (404, "text/plain; charset=utf-8", b"not found\n".to_vec()),
    };
    let mut response = Response::from_data(body).with_status_code(StatusCode(status));
    // A page that was built anew is loaded anew.
    for (field, value) in [("Content-Type", kind), ("Cache-Control", "no-cache"), ("X-Content-Type-Options", "nosniff")]
    {
        if let Ok(header) = Header::from_bytes(field, value) {
            response.add_header(header);
        }
    }
    request.respond(response)
}

/// The media type of a file of the page, which browsers insist on for modules.
fn kind_of(name: &str) -> &'static str {
    match name.rsplit_once('.').map_or("", |(_, ending)| ending) {
        "html" => "text/html; charset=utf-8",
        "css" => "text/css; charset=utf-8",
        "js" => "text/javascript; charset=utf-8",
        "wasm" => "application/wasm",
        "json" => "application/json",
        _ => "application/octet-stream",
    }
}
