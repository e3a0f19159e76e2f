use pgherd_page::model::{ListenerRow, MemberState, RouteRow, Teller};

use super::*;

/// The first line of HAProxy 2.6.12, as it came from one.
const HAPROXY: &str = "# pxname,svname,qcur,qmax,scur,smax,slim,stot,bin,bout,dreq,dresp,ereq,econ,eresp,wretr,wredis,status,weight,act,bck,chkfail,chkdown,lastchg,downtime,qlimit,pid,iid,sid,throttle,lbtot,tracked,type,rate,rate_lim,rate_max,check_status,check_code,check_duration,hrsp_1xx,hrsp_2xx,hrsp_3xx,hrsp_4xx,hrsp_5xx,hrsp_other,hanafail,req_rate,req_rate_max,req_tot,cli_abrt,srv_abrt,comp_in,comp_out,comp_byp,comp_rsp,lastsess,last_chk,last_agt,qtime,ctime,rtime,ttime,agent_status,agent_code,agent_duration,check_desc,agent_desc,check_rise,check_fall,check_health,agent_rise,agent_fall,agent_health,addr,cookie,mode,algo,conn_rate,conn_rate_max,conn_tot,intercepted,dcon,dses,wrew,connect,reuse,cache_lookups,cache_hits,srv_icur,src_ilim,qtime_max,ctime_max,rtime_max,ttime_max,eint,idle_conn_cur,safe_conn_cur,used_conn_cur,need_conn_est,uweight,agg_server_status,agg_server_check_status,agg_check_status,-,ssl_sess,ssl_reused_sess,ssl_failed_handshake,h2_headers_rcvd,h2_data_rcvd,h2_settings_rcvd,h2_rst_stream_rcvd,h2_goaway_rcvd,h2_detected_conn_protocol_errors,h2_detected_strm_protocol_errors,h2_rst_stream_resp,h2_goaway_resp,h2_open_connections,h2_backend_open_streams,h2_total_connections,h2_backend_total_streams,h1_open_connections,h1_open_streams,h1_total_connections,h1_total_streams,h1_bytes_in,h1_bytes_out,h1_spliced_bytes_in,h1_spliced_bytes_out,";

/// n1 takes writes, n2 reads, n3 nothing.
pub(crate) fn state() -> State {
    let listener = |name: &str, role| ListenerRow {
        name: name.to_owned(),
        role,
        connections: 4,
        held: 1,
        sessions: 3,
        sessions_total: 70,
        accepted_total: 80,
        refused_total: 9,
        ..ListenerRow::default()
    };
    let member = |name: &str, takes| MemberState {
        name: name.to_owned(),
        takes,
        weight: 0.5,
        left_out: takes
            .is_none()
            .then(|| "it is 3 MB behind, more than \"1 MB\"".to_owned()),
        ..MemberState::default()
    };
    let mut state = State::unknown("c", Teller::Proxy);
    state.listeners = vec![
        listener("0.0.0.0:5432", "write"),
        listener("0.0.0.0:5433", "read"),
        listener("[::]:5434", "read"),
    ];
    state.members = vec![
        member("n1", Some("write")),
        member("n2", Some("read")),
        member("n3", None),
    ];
    state.routes = vec![RouteRow {
        listener: "0.0.0.0:5432".to_owned(),
        member: "n1".to_owned(),
        open: 3,
        total: 70,
        bytes_to_server: 1000,
        bytes_to_client: 200_000,
    }];
    state
}

/// A line taken apart as encoding/csv of Go does, which is what haproxy_exporter reads with.
fn fields(line: &str) -> Vec<String> {
    let (mut fields, mut field, mut quoted) = (Vec::new(), String::new(), false);
    let mut rest = line.chars().peekable();
    while let Some(c) = rest.next() {
        match c {
            '"' if quoted && rest.peek() == Some(&'"') => field.extend(rest.next()),
            '"' => quoted = !quoted,
            ',' if !quoted => fields.push(std::mem::take(&mut field)),
            c => field.push(c),
        }
    }
    fields.push(field);
    fields
}

#[test]
fn the_columns_are_haproxys() {
    let text = csv(&state(), &Watched::default(), 100);
    assert_eq!(text.lines().next(), Some(HAPROXY));
    let columns = HAPROXY.split(',').count();
    for line in text.lines() {
        assert_eq!(fields(line).len(), columns, "{line}");
    }
}

/// haproxy_exporter 0.15 takes the columns by number: 32 is the type, 17 the status, and each of the others is a whole number
/// or empty (`parseRow`, `exportCsvFields`).
#[test]
fn an_exporter_of_haproxys_finds_what_it_looks_for() {
    let (mut frontends, mut backends, mut servers) = (Vec::new(), Vec::new(), Vec::new());
    let text = csv(&state(), &Watched::default(), 100);
    for line in text.lines().skip(1) {
        let row = fields(line);
        assert!(row.len() >= 33);
        for number in (2..62).filter(|number| ![17, 36, 55, 56, 57].contains(number)) {
            let value = &row[number];
            assert!(
                value.is_empty() || value.parse::<i64>().is_ok(),
                "column {number} is {value:?} in {line}"
            );
        }
        let up = ["UP", "UP 1/3", "UP 2/3", "OPEN", "no check", "DRAIN"].contains(&row[17].as_str());
        let row = (row[0].clone(), row[1].clone(), up, row[4].clone());
        match row.1.as_str() {
            "FRONTEND" => frontends.push(row),
            "BACKEND" => backends.push(row),
            _ => servers.push(row),
        }
    }
    let all = |rows: &[(String, String, bool, String)]| -> Vec<String> {
        rows.iter()
            .map(|(proxy, name, up, now)| format!("{proxy} {name} {} {now}", if *up { "up" } else { "down" }))
            .collect()
    };
    assert_eq!(
        all(&frontends),
        [
            "primary FRONTEND up 4",
            "replicas FRONTEND up 4",
            "replicas_5434 FRONTEND up 4"
        ]
    );
    assert_eq!(
        all(&backends),
        [
            "primary BACKEND up 3",
            "replicas BACKEND up 3",
            "replicas_5434 BACKEND up 3"
        ]
    );
    assert_eq!(
        all(&servers)[..6],
        [
            "primary n1 up 3",
            "primary n2 down 0",
            "primary n3 down 0",
            "replicas n1 down 0",
            "replicas n2 up 0",
            "replicas n3 down 0"
        ]
    );
}

#[test]
fn the_type_of_a_row_is_in_its_column() {
    let text = csv(&state(), &Watched::default(), 100);
    let kinds: Vec<String> = text
        .lines()
        .skip(1)
        .take(5)
        .map(|line| fields(line)[32].clone())
        .collect();
    assert_eq!(kinds, ["0", "2", "2", "2", "1"]);
    let why = text
        .lines()
        .find(|line| line.starts_with("primary,n3,"))
        .map(|line| fields(line)[56].clone());
    assert_eq!(why.as_deref(), Some("it is 3 MB behind, more than \"1 MB\""));
}
