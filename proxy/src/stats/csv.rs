//! `/stats;csv`: what HAProxy's page of that name has, in the columns of HAProxy 2.6, so that what scrapes it need not know
//! that we are not HAProxy. A listener is a frontend and a backend of one name, a member is a server.
//!
//! The columns and their meaning: "9.1. CSV format" of HAProxy's Management Guide. What has no meaning here is empty, as
//! it is there for rows of another kind.

mod watched;

pub(crate) use watched::Watched;

use std::collections::BTreeMap;

use pgherd_page::model::{ListenerRow, MemberState, RouteRow, State};

use self::watched::Seen;

/// All that HAProxy 2.6 prints; those from `-` on are of its modules.
const COLUMNS: &str = "pxname,svname,qcur,qmax,scur,smax,slim,stot,bin,bout,dreq,dresp,ereq,econ,eresp,wretr,wredis,status,\
weight,act,bck,chkfail,chkdown,lastchg,downtime,qlimit,pid,iid,sid,throttle,lbtot,tracked,type,rate,rate_lim,rate_max,\
check_status,check_code,check_duration,hrsp_1xx,hrsp_2xx,hrsp_3xx,hrsp_4xx,hrsp_5xx,hrsp_other,hanafail,req_rate,\
req_rate_max,req_tot,cli_abrt,srv_abrt,comp_in,comp_out,comp_byp,comp_rsp,lastsess,last_chk,last_agt,qtime,ctime,rtime,\
ttime,agent_status,agent_code,agent_duration,check_desc,agent_desc,check_rise,check_fall,check_health,agent_rise,\
agent_fall,agent_health,addr,cookie,mode,algo,conn_rate,conn_rate_max,conn_tot,intercepted,dcon,dses,wrew,connect,reuse,\
cache_lookups,cache_hits,srv_icur,src_ilim,qtime_max,ctime_max,rtime_max,ttime_max,eint,idle_conn_cur,safe_conn_cur,\
used_conn_cur,need_conn_est,uweight,agg_server_status,agg_server_check_status,agg_check_status,-,ssl_sess,\
ssl_reused_sess,ssl_failed_handshake,h2_headers_rcvd,h2_data_rcvd,h2_settings_rcvd,h2_rst_stream_rcvd,h2_goaway_rcvd,\
h2_detected_conn_protocol_errors,h2_detected_strm_protocol_errors,h2_rst_stream_resp,h2_goaway_resp,h2_open_connections,\
h2_backend_open_streams,h2_total_connections,h2_backend_total_streams,h1_open_connections,h1_open_streams,\
h1_total_connections,h1_total_streams,h1_bytes_in,h1_bytes_out,h1_spliced_bytes_in,h1_spliced_bytes_out";

/// What a row is of, in the column `type`.
#[derive(Clone, Copy)]
enum Kind {
    Frontend = 0,
    Backend = 1,
    Server = 2,
}

/// One line: the columns that have a value.
#[derive(Default)]
struct Row(BTreeMap<&'static str, String>);

impl Row {
    fn new(kind: Kind, proxy: &str, name: &str, proxy_number: usize, server_number: usize) -> Self {
        let mut row = Self::default();
        row.text("pxname", proxy)
            .text("svname", name)
            .text("mode", "tcp")
            .text("-", "-");
        row.number("type", kind as u8).number("pid", 1_u8);
        row.number("iid", proxy_number).number("sid", server_number);
        row
    }

    fn text(&mut self, column: &'static str, text: &str) -> &mut Self {
        // As RFC 4180 has it, which is what HAProxy writes.
        let text = if text.contains([',', '"', '\n', '\r']) {
            format!("\"{}\"", text.replace('"', "\"\"").replace(['\n', '\r'], " "))
        } else {
            text.to_owned()
        };
        self.0.insert(column, text);
        self
    }

    fn number(&mut self, column: &'static str, number: impl TryInto<u64>) -> &mut Self {
        let number: u64 = number.try_into().unwrap_or(u64::MAX);
        self.0.insert(column, number.to_string());
        self
    }

    /// Columns that HAProxy has for a row of this kind, and that nothing here ever counts.
    fn zeros(&mut self, columns: &[&'static str]) -> &mut Self {
        for column in columns {
            self.number(column, 0_u8);
        }
        self
    }

    /// What was seen each second.
    fn seen(&mut self, seen: Seen) -> &mut Self {
        self.number("smax", seen.sessions_max)
            .number("rate", seen.rate)
            .number("rate_max", seen.rate_max)
    }

    fn status(&mut self, up: bool, seen: Seen) -> &mut Self {
        self.text("status", if up { "UP" } else { "DOWN" });
        self.number("lastchg", seen.since_seconds)
            .number("downtime", seen.down_seconds)
            .number("chkdown", seen.downs)
    }

    fn line(&self) -> String {
        let values = COLUMNS
            .split(',')
            .map(|column| self.0.get(column).map_or("", String::as_str));
        let mut line = String::new();
        for value in values {
            line.push_str(value);
            line.push(',');
        }
        line.push('\n');
        line
    }
}

/// The proxy as HAProxy would tell it. `connections_max` is the limit of all listeners together.
pub(crate) fn csv(state: &State, watched: &Watched, connections_max: usize) -> String {
    let mut text = format!("# {COLUMNS},\n");
    for (number, (listener, name)) in state.listeners.iter().zip(names(&state.listeners)).enumerate() {
        let part = Part {
            state,
            watched,
            listener,
            name: &name,
            // HAProxy counts from 2: 1 is its own.
            number: number + 2,
        };
        text.push_str(&part.frontend(connections_max).line());
        for (number, member) in state.members.iter().enumerate() {
            text.push_str(&part.server(member, number + 1).line());
        }
        text.push_str(&part.backend(connections_max).line());
    }
    text
}

/// What the listeners of a usual configuration are called; further ones of a role have their port behind it.
fn names(listeners: &[ListenerRow]) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for listener in listeners {
        let role = match listener.role {
            "write" => "primary",
            "read" => "replicas",
            other => other,
        };
        let name = if names.iter().any(|taken| taken == role) {
            let port = listener.name.rsplit(':').next().unwrap_or_default();
            format!("{role}_{port}")
        } else {
            role.to_owned()
        };
        names.push(name);
    }
    names
}

/// One listener among the state that it is part of.
struct Part<'a> {
    state: &'a State,
    watched: &'a Watched,
    listener: &'a ListenerRow,
    name: &'a str,
    number: usize,
}

impl Part<'_> {
    fn frontend(&self, connections_max: usize) -> Row {
        let listener = self.listener;
        let mut row = Row::new(Kind::Frontend, self.name, "FRONTEND", self.number, 0);
        row.number("scur", listener.connections)
            .number("slim", connections_max)
            .number("stot", listener.accepted_total)
            .number("conn_tot", listener.accepted_total)
            .number("dreq", listener.refused_total)
            .text("status", "OPEN")
            .zeros(&[
                "dresp",
                "ereq",
                "rate_lim",
                "dcon",
                "dses",
                "intercepted",
                "eint",
                "comp_in",
                "comp_out",
                "comp_byp",
                "comp_rsp",
            ]);
        let seen = self.watched.listener(&listener.name);
        row.seen(seen)
            .number("conn_rate", seen.rate)
            .number("conn_rate_max", seen.rate_max);
        self.bytes(&mut row, self.routes());
        row
    }

    fn routes(&self) -> impl Iterator<Item = &RouteRow> {
        self.state
            .routes
            .iter()
            .filter(|route| route.listener == self.listener.name)
    }

    fn bytes<'r>(&self, row: &mut Row, routes: impl Iterator<Item = &'r RouteRow>) {
        let (mut to_server, mut to_client) = (0_u64, 0_u64);
        for route in routes {
            to_server += route.bytes_to_server;
            to_client += route.bytes_to_client;
        }
        row.number("bin", to_server).number("bout", to_client);
    }

    fn server(&self, member: &MemberState, number: usize) -> Row {
        let mut row = Row::new(Kind::Server, self.name, &member.name, self.number, number);
        let route = || self.routes().filter(|route| route.member == member.name);
        let up = self.takes(member);
        let (open, total) = (
            route().map(|route| route.open).sum::<usize>(),
            route().map(|route| route.total).sum::<u64>(),
        );
        row.number("scur", open)
            .number("stot", total)
            .number("lbtot", total)
            .number("connect", total);
        row.number("used_conn_cur", open)
            .number("act", 1_u8)
            .number("bck", 0_u8);
        self.bytes(&mut row, route());
        let weight = percent(member.weight);
        row.number("weight", weight).number("uweight", weight);
        let seen = self.watched.route(&self.listener.name, &member.name);
        row.seen(seen).status(up, seen);
        let (status, code, what) = if up {
            ("L7OK", 200_u16, "Layer7 check passed")
        } else {
            ("L7STS", 503, "Layer7 wrong status")
        };
        row.text("check_status", status)
            .number("check_code", code)
            .text("check_desc", what);
        row.text("last_chk", member.left_out.as_deref().unwrap_or_default());
        if let Some(address) = &member.address {
            row.text("addr", address);
        }
        if let Some(seconds) = member.connect_seconds {
            row.number("ctime", millis(seconds));
        }
        row.zeros(&[
            "qcur", "qmax", "dresp", "econ", "eresp", "wretr", "wredis", "chkfail", "cli_abrt", "srv_abrt", "eint",
            "reuse",
        ]);
        row
    }

    /// Whether clients of this listener may come to a member, as a check of HAProxy's before each would find.
    fn takes(&self, member: &MemberState) -> bool {
        let leads = self.state.leads(&member.name);
        match self.listener.role {
            "write" => member.takes == Some("write"),
            "standby_leader" => leads && member.takes.is_some(),
            "any" => member.takes.is_some(),
            _ => !leads && member.takes == Some("read"),
        }
    }

    fn backend(&self, connections_max: usize) -> Row {
        let listener = self.listener;
        let mut row = Row::new(Kind::Backend, self.name, "BACKEND", self.number, 0);
        let up = self.state.members.iter().filter(|member| self.takes(member)).count();
        row.number("qcur", listener.held)
            .number("scur", listener.sessions)
            .number("slim", connections_max)
            .number("stot", listener.sessions_total)
            .number("lbtot", listener.sessions_total)
            .number("connect", listener.sessions_total)
            .number("econ", listener.hold_expired_total)
            .number("srv_abrt", listener.ended_total)
            .number("act", up)
            .number("weight", up * 100);
        let seen = self.watched.backend(&listener.name);
        row.seen(seen).status(up > 0, seen).number("qmax", seen.queue_max);
        self.bytes(&mut row, self.routes());
        row.zeros(&[
            "dreq", "dresp", "eresp", "wretr", "wredis", "bck", "cli_abrt", "eint", "reuse", "comp_in", "comp_out",
            "comp_byp", "comp_rsp",
        ]);
        row
    }
}

/// A part of 1 in hundredths.
fn percent(part: f64) -> u64 {
    millis(part / 10.0)
}

fn millis(seconds: f64) -> u64 {
    let millis = std::time::Duration::try_from_secs_f64(seconds)
        .unwrap_or_default()
        .as_millis();
    u64::try_from(millis).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
