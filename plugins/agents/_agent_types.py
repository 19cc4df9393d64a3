"""The agent types that cco_sidecar knows without anybody's settings, with their categories."""

from __future__ import annotations

from cco_sidecar import AGENT_TYPES


def categories_of(table: dict[str, str]) -> dict[str, str]:
    """Type and category, by a category's types in one text."""
    return {name: category for category, names in table.items() for name in names.split()}


MORE_TYPES = categories_of({
    "coding": """
        objective-c-specialist html-css-specialist react-specialist angular-specialist nextjs-specialist
        nodejs-specialist django-specialist fastapi-specialist flask-specialist rails-specialist laravel-specialist
        spring-specialist dotnet-specialist flutter-specialist react-native-specialist ios-specialist
        android-specialist grpc-specialist websocket-specialist wasm-specialist embedded-specialist
        game-specialist blockchain-specialist mobile-developer desktop-developer api-developer legacy-modernizer
        refactoring-specialist debugging-specialist api-integration-specialist salesforce-specialist
        authentik-specialist payment-integration-specialist webhook-specialist data-engineer data-scientist
        database-architect database-administrator etl-specialist analytics-engineer devops-engineer cloud-architect
        kubernetes-specialist docker-specialist ci-cd-specialist site-reliability-engineer
        network-engineer platform-engineer observability-engineer machine-learning-engineer mlops-engineer ai-engineer
        prompt-engineer llm-specialist mcp-developer mcp-integration-engineer tooling-engineer build-engineer""",
    "qa": "test-automator accessibility-tester",
    "security": "security-engineer penetration-tester compliance-auditor api-security-auditor",
    "documentation": "api-documenter changelog-writer tutorial-writer",
    "support": """
        academic-researcher competitive-researcher business-analyst product-manager project-manager ux-designer
        ui-designer customer-support credential-manager incident-responder dependency-manager git-expert
        content-strategist""",
})  # fmt: skip
BUILT_IN = categories_of(AGENT_TYPES) | MORE_TYPES
