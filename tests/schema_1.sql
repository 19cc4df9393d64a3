-- the schema of version 1, whose databases are still opened

create table if not exists meta (name text primary key, value text not null) without rowid;

create table if not exists event (
  seq integer primary key autoincrement, project text not null, type text not null, topic text not null,
  issue text, created real not null, expires real not null, delivered integer not null default 0,
  body blob not null);                              -- the envelope as readers get it, without its id
create index if not exists event_by_type on event (project, type, seq);
create index if not exists event_by_issue on event (project, issue, seq) where issue is not null;
create index if not exists event_by_expiry on event (expires);

create table if not exists dead_letter (
  seq integer primary key, project text not null, type text not null, topic text not null, body blob not null);
create index if not exists dead_letter_by_project on dead_letter (project);

create table if not exists position (
  project text not null, subject text not null, type text not null, filter text not null,
  seq integer not null, moved real not null, primary key (project, subject, type, filter)) without rowid;
create index if not exists position_by_age on position (moved);

create table if not exists result (
  seq integer primary key autoincrement, id text not null unique, project text not null, issue text not null,
  agent_type text not null, agent_id text not null, category text not null, status text not null, stored real not null,
  proposed text not null, output text not null, body blob not null);
create index if not exists result_facts on result (project, issue, seq, agent_type, category, status, proposed);
create index if not exists result_by_agent on result (project, agent_id, seq);
create index if not exists result_by_type on result (project, agent_type, seq);
create index if not exists result_by_status on result (project, status, seq);

create table if not exists agent (
  seq integer primary key autoincrement, id text not null unique, project text not null, type text not null,
  issue text not null, task text not null, parent text, state text not null, pid integer, pid_started real,
  started real not null, ended real, exit_code integer, signal integer, time_limit real not null);
create index if not exists agent_by_project on agent (project, state);
create index if not exists agent_by_issue on agent (project, issue, seq);
create index if not exists agent_by_type on agent (project, type, seq);
create index if not exists agent_by_end on agent (project, ended);

-- depth, permissions, only_issue: what the agent's token may, and where; birth, seen: its processes; ordered: its end
create table if not exists agent_evidence (
  agent text primary key, depth integer not null, permissions text not null, only_issue text,
  birth text, seen text not null default '[]', ordered integer not null default 0,
  cpu real, memory integer, peak_memory integer, processes integer, measured real, last_call text) without rowid;
create table if not exists agent_outcome (agent text primary key, outcome text not null) without rowid;  -- JSON

create table if not exists revoked (
  project text not null, subject text not null, since real not null, primary key (project, subject)) without rowid;

-- what is kept as a number in meta; results are counted anew at each start
create trigger if not exists event_stored after insert on event begin
  insert into meta values ('published:' || new.project, 1), ('undelivered:' || new.project, new.delivered = 0)
  on conflict do update set value = value + excluded.value; end;
create trigger if not exists event_delivered after update of delivered on event begin
  update meta set value = value - 1 where name = 'undelivered:' || new.project; end;
create trigger if not exists event_removed after delete on event when old.delivered = 0 begin
  update meta set value = value - 1 where name = 'undelivered:' || old.project; end;
create trigger if not exists result_stored after insert on result begin
  insert into meta values ('results:' || new.project, 1) on conflict do update set value = value + 1; end;
delete from meta where name like 'results:%';
insert into meta select 'results:' || project, count(*) from result group by project;

pragma application_id = 0x63636f31;
pragma user_version = 1;
